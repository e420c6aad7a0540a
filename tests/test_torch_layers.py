import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_deepcrl.common.losses import info_nce
from sb3_deepcrl.common.torch_layers import ResidualBlock, ResidualTower
from sb3_deepcrl.common.utils import check_depth
from sb3_deepcrl.deepcrl import DeepCRL, MultiInputPolicy
from tests.envs import GoalReachEnv


def count_dense(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.Linear) for layer in module.modules())


@pytest.mark.parametrize("depth", [4, 8, 64])
def test_depth_counts_the_dense_layers_of_the_blocks(depth):
    tower = ResidualTower(7, 3, depth=depth, width=16)
    assert count_dense(tower.blocks) == depth
    # The first layer and the head come on top
    assert count_dense(tower) == depth + 2
    assert len(tower.blocks) == depth // 4
    assert tower(th.randn(5, 7)).shape == (5, 3)


@pytest.mark.parametrize("depth", [0, -4, 3, 5, 6, 1022, 4.0, True, "16", None])
def test_depth_that_cannot_be_built(depth):
    with pytest.raises(ValueError, match=r"`actor_depth` must be a positive multiple of 4.*got " + repr(depth)):
        check_depth(depth, "actor_depth")


@pytest.mark.parametrize(("depth", "fix"), [(6, "use 4 or 8"), (3, "use 4$"), (1022, "use 1020 or 1024")])
def test_depth_error_tells_what_to_use(depth, fix):
    with pytest.raises(ValueError, match=fix):
        check_depth(depth)


def test_numpy_integers_are_integers():
    assert check_depth(np.int64(16)) == 4


def test_block_is_four_layers_and_the_identity():
    th.manual_seed(0)
    block = ResidualBlock(8, scale=0.25)
    x = th.randn(3, 8)
    expected = x
    for dense, norm in zip(block.branch[0::3], block.branch[1::3], strict=True):
        expected = nn.functional.silu(
            nn.functional.layer_norm(expected @ dense.weight.T + dense.bias, (8,), norm.weight, norm.bias, eps=1e-6)
        )
    th.testing.assert_close(block(x), x + 0.25 * expected)
    assert [type(layer) for layer in block.branch] == [nn.Linear, nn.LayerNorm, nn.SiLU] * 4


def test_block_without_identity():
    block = ResidualBlock(8, residual=False)
    x = th.randn(3, 8)
    th.testing.assert_close(block(x), block.branch(x))


def test_options_change_the_network():
    tower = ResidualTower(4, 2, depth=8, width=12, activation_fn=nn.ReLU, norm="none")
    modules = list(tower.modules())
    assert not any(isinstance(module, (nn.LayerNorm, nn.SiLU)) for module in modules)
    assert sum(isinstance(module, nn.ReLU) for module in modules) == 9
    assert tower.stem[0].out_features == 12


def test_normalization_of_ones_own():
    tower = ResidualTower(4, 2, depth=8, width=12, norm=nn.BatchNorm1d)
    assert [norm.num_features for norm in tower.modules() if isinstance(norm, nn.BatchNorm1d)] == [12] * 9
    assert not any(isinstance(module, nn.LayerNorm) for module in tower.modules())


def test_initialization_is_lecun_uniform():
    th.manual_seed(0)
    tower = ResidualTower(300, 64, depth=4, width=256)
    for dense in (layer for layer in tower.modules() if isinstance(layer, nn.Linear)):
        bound = dense.in_features**-0.5
        assert dense.weight.abs().max() <= bound
        # Variance of the uniform law: bound^2 / 3
        assert dense.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not dense.bias.any()


@pytest.mark.parametrize(
    ("residual_scale", "expected", "learned"), [(1, 1.0, False), ("1/N", 0.25, False), ("learnable", 0.25, True)]
)
def test_residual_scale(residual_scale, expected, learned):
    tower = ResidualTower(3, 2, depth=16, width=8, residual_scale=residual_scale)
    for block in tower.blocks:
        assert block.scale.item() == expected
        assert isinstance(block.scale, nn.Parameter) == learned


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(norm="batch"), "`norm` must be"),
        (dict(residual_scale="1/n"), "`residual_scale` must be"),
        (dict(residual_scale=0.0), "`residual_scale` must be"),
        (dict(width=0), "`width` must be a positive integer, got 0"),
    ],
)
def test_wrong_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ResidualTower(3, 2, depth=4, **kwargs)


def test_checkpoints_of_what_is_random():
    norm = lambda width: nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.5))  # noqa: E731
    tower, gradients = ResidualTower(3, 1, depth=8, width=16, norm=norm), []
    for tower.checkpoint_activations in (False, True):
        tower.zero_grad()
        th.manual_seed(1)
        tower(th.ones(5, 3)).sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    th.testing.assert_close(*gradients)
    kwargs = dict(depth=4, width=16, checkpoint_activations=True, policy_kwargs=dict(norm=nn.BatchNorm1d))
    with pytest.raises(ValueError, match="would update the statistics of BatchNorm1d twice: leave it at False"):
        DeepCRL("MultiInputPolicy", GoalReachEnv(), **kwargs).learn(100)


def start_of_training(depth: int, residual_scale: float | str | None = None) -> dict[str, float]:
    """
    :param depth: Depth of all networks
    :param residual_scale: Factor of the residual branches, None for the default
    :return: Sizes of logits, gradients and pre-tanh means before the first update, for inputs of the humanoid's size
    """
    th.manual_seed(0)
    box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    observation_space = spaces.Dict(
        observation=spaces.Box(-np.inf, np.inf, (246,), np.float32), achieved_goal=box, desired_goal=box
    )
    kwargs = {} if residual_scale is None else dict(residual_scale=residual_scale)
    policy = MultiInputPolicy(observation_space, spaces.Box(-1, 1, (17,)), lambda _: 3e-4, depth=depth, **kwargs)
    obs = {key: th.randn(32, *space.shape) for key, space in observation_space.spaces.items()}
    goal_repr = policy.critic.encode_goal(obs)
    state_action_repr = policy.critic.encode_state_action(policy.critic.extract_state_features(obs), th.rand(32, 17) * 2 - 1)
    logits = -th.cdist(state_action_repr, goal_repr).detach()
    info_nce(state_action_repr, goal_repr, logsumexp_coef=0.1)[0].backward()
    mean, _ = policy.actor.get_action_dist_params(obs)
    value = policy.critic(obs, th.tanh(mean)).mean()
    value.backward(inputs=list(policy.actor.parameters()))

    def grad_norm(module: nn.Module) -> float:
        return (
            th.stack([parameter.grad.norm() for parameter in module.parameters() if parameter.grad is not None]).norm().item()
        )

    return {
        "logits": logits.abs().mean().item(),
        "critic gradient": grad_norm(policy.critic),
        "pre-tanh mean": mean.abs().mean().item(),
        "actor gradient": grad_norm(policy.actor),
    }


@pytest.mark.slow
def test_default_starts_the_same_at_every_depth():
    shallow = start_of_training(4)
    for depth in (64, 256, 1024):
        deep = start_of_training(depth)
        for name, size in shallow.items():
            assert size / 4 < deep[name] < 4 * size, f"{name}: {size} at depth 4, {deep[name]} at depth {depth}"


def test_scale_of_the_paper_grows_with_depth():
    shallow, deep = start_of_training(4, 1.0), start_of_training(256, 1.0)
    assert deep["logits"] > 8 * shallow["logits"]
    assert deep["critic gradient"] > 100 * shallow["critic gradient"]
