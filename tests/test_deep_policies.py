import pickle
import re
import subprocess
import sys
import warnings
from functools import cache, partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import MlpPolicy
from torch import nn

from sb3_deepcrl import DeepResidualExtractor, SuccessInfoWrapper, compile_blocks, register_policies, unregister_policies
from sb3_deepcrl.common import compilation
from sb3_deepcrl.common.torch_layers import ResidualTower, residual_blocks
from sb3_deepcrl.deep_policies.policies import DeepDQNPolicy, DeepSACPolicy
from sb3_deepcrl.deep_policies.registry import NAMES, POLICIES
from tests.envs import GoalReachEnv

GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "deep_policies.md"
ON_POLICY = ("PPO", "A2C", "TRPO")
DISCRETE = ("DQN", "QRDQN")
CONTRIB = ("TQC", "CrossQ", "QRDQN", "TRPO")
TABLE = [
    (algorithm, alias)
    for algorithm in ("SAC", "TD3", "DDPG", "DQN", "PPO", "A2C", *CONTRIB)
    for alias in (NAMES[:1] if algorithm == "CrossQ" else NAMES)
]

needs_compiler = pytest.mark.skipif(
    compilation.why_not_compiled("cpu") is not None, reason=f"torch.compile fails: {compilation.why_not_compiled('cpu')}"
)


def algorithm_of(name: str) -> type[BaseAlgorithm]:
    return getattr(pytest.importorskip("sb3_contrib") if name in CONTRIB else stable_baselines3, name)


@cache
def env_of(alias: str, discrete: bool) -> gym.Env:
    if alias == "DeepMlpPolicy":
        return gym.make("CartPole-v1" if discrete else "Pendulum-v1")
    if alias == "DeepCnnPolicy":
        return FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=discrete)
    return SimpleMultiObsEnv(discrete_actions=True) if discrete else GoalReachEnv()


def make_model(name: str, alias: str = "DeepMlpPolicy", env: gym.Env | None = None, **kwargs) -> BaseAlgorithm:
    policy_kwargs = dict(depth=4, width=8, **kwargs.pop("policy_kwargs", {}))
    if name in ON_POLICY:
        settings = dict(n_steps=100) if name == "A2C" else dict(n_steps=100, batch_size=50)
    else:
        settings = dict(learning_starts=150, batch_size=8, buffer_size=300)
        if name in DISCRETE:
            settings["target_update_interval"] = 100
    env = env or env_of(alias, name in DISCRETE)
    return algorithm_of(name)(alias, env, policy_kwargs=policy_kwargs, seed=0, device="cpu", **{**settings, **kwargs})


def observations(model: BaseAlgorithm, n: int = 5) -> np.ndarray | dict[str, np.ndarray]:
    model.observation_space.seed(1)
    samples = [model.observation_space.sample() for _ in range(n)]
    if isinstance(samples[0], dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


def assert_same(first: BaseAlgorithm | BasePolicy, second: BaseAlgorithm | BasePolicy, obs) -> None:
    np.testing.assert_array_equal(first.predict(obs, deterministic=True)[0], second.predict(obs, deterministic=True)[0])


def towers(module: nn.Module) -> list[ResidualTower]:
    return [tower for tower in module.modules() if isinstance(tower, ResidualTower)]


def vector(module: nn.Module) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


# --- Every algorithm and policy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "alias"), TABLE)
def test_learns_saves_and_loads(name, alias, tmp_path):
    model = make_model(name, alias)
    assert type(model.policy) is POLICIES[type(model)][NAMES.index(alias)]
    for tower in towers(model.policy):
        assert len(tower.blocks) == 1 and tower.output_dim == 8
        # The paper's initialization, whatever the algorithm does with other layers
        assert tower.blocks[0].branch[0].weight.abs().max() <= 8**-0.5
    n_towers = dict(SAC=5, TD3=6, DDPG=4, TQC=5, CrossQ=3).get(name, 2)
    assert len(towers(model.policy)) == n_towers
    before = [vector(tower) for tower in towers(model.policy)]

    model.learn(200)
    # All towers learn, those of target networks too
    assert not any(th.equal(vector(tower), old) for tower, old in zip(towers(model.policy), before, strict=True))

    obs = observations(model)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert type(loaded.policy) is type(model.policy)
    assert_same(loaded, model, obs)

    model.policy.save(tmp_path / "policy")
    assert_same(type(model.policy).load(tmp_path / "policy", device="cpu"), model, obs)


@pytest.mark.parametrize("name", ["SAC", "TQC", "CrossQ", "PPO", "A2C", "TRPO"])
def test_gsde(name, tmp_path):
    model = make_model(name, use_sde=True, sde_sample_freq=4)
    model.learn(200)
    # One row of the exploration matrix for each unit of the tower
    actor = model.policy if name in ON_POLICY else model.actor
    assert actor.log_std.shape == (8, 1)
    model.save(tmp_path / "model")
    assert_same(type(model).load(tmp_path / "model", device="cpu"), model, observations(model))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["SAC", "TD3", "PPO", "TQC"])
def test_share_features_extractor(name, share, tmp_path):
    model = make_model(name, "DeepCnnPolicy", policy_kwargs=dict(share_features_extractor=share))
    policy = model.policy
    if name == "PPO":
        pair = policy.pi_features_extractor, policy.vf_features_extractor
    else:
        pair = policy.actor.features_extractor, policy.critic.features_extractor
    assert (pair[0] is pair[1]) == share and isinstance(pair[0], NatureCNN)
    model.learn(160)
    obs = observations(model)
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy", device="cpu")
    assert loaded.share_features_extractor == share
    assert_same(loaded, model, obs)
    if name == "PPO":
        tensor = policy.obs_to_tensor(obs)[0]
        assert th.equal(loaded.predict_values(tensor), policy.predict_values(tensor))


@pytest.mark.parametrize("name", ["SAC", "PPO"])
def test_vec_normalize(name, tmp_path):
    env = VecNormalize(make_vec_env(GoalReachEnv, 2))
    kwargs = {} if name == "PPO" else dict(replay_buffer_class=HerReplayBuffer)
    model = make_model(name, "DeepMultiInputPolicy", env, **kwargs).learn(200)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=env, device="cpu")
    assert loaded.get_vec_normalize_env() is env
    assert_same(loaded, model, env.reset())


def test_very_deep_sac_with_her_on_the_point_maze(tmp_path):
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    env = make_vec_env("PointMaze_UMaze-v3", wrapper_class=SuccessInfoWrapper)
    model = SAC(
        "DeepMultiInputPolicy",
        env,
        policy_kwargs=dict(depth=64, width=16),
        replay_buffer_class=HerReplayBuffer,
        buffer_size=1000,
        learning_starts=300,
        batch_size=32,
        device="cpu",
        seed=0,
    )
    assert [len(tower.blocks) for tower in towers(model.policy)] == [16] * 5
    before = vector(model.actor), vector(model.critic)
    model.learn(310)
    assert model._n_updates == 10
    for network, old in zip((model.actor, model.critic), before, strict=True):
        new = vector(network)
        assert th.isfinite(new).all() and not th.equal(new, old)
    assert model.logger.name_to_value["train/critic_loss"] < 100
    model.save(tmp_path / "model")
    assert_same(SAC.load(tmp_path / "model", env=env, device="cpu"), model, env.reset())


@pytest.mark.parametrize(
    "line", re.findall(r"`([A-Z]\w+\(.*\))` \|$", GUIDE.read_text(), flags=re.MULTILINE), ids=lambda line: line.split("(")[0]
)
def test_examples_of_the_guide(line):
    name = line.split("(")[0]
    scope = {
        name: algorithm_of(name),
        "env": env_of("DeepMlpPolicy", False),
        "discrete_env": env_of("DeepMlpPolicy", True),
        "image_env": env_of("DeepCnnPolicy", True),
        "goal_env": env_of("DeepMultiInputPolicy", False),
        "nn": nn,
        "DeepResidualExtractor": DeepResidualExtractor,
        "HerReplayBuffer": HerReplayBuffer,
    }
    model = eval(line, scope)
    depth = model.policy_kwargs.get("depth", 16)
    depths = set(depth.values()) if isinstance(depth, dict) else {depth}
    assert {4 * len(tower.blocks) for tower in towers(model.policy)} == depths
    assert model.predict(observations(model))[0].shape[1:] == model.action_space.shape


def test_guide_names_every_algorithm_and_policy():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| `\w+\(", GUIDE.read_text(), flags=re.MULTILINE)
    assert [(name, alias) for name, *cells in rows for alias, cell in zip(NAMES, cells, strict=True) if cell == "✔️"] == TABLE


# --- Arguments ------------------------------------------------------------------------------------------------------------


def test_actor_and_critic_may_differ(tmp_path):
    separate = dict(
        depth=dict(pi=4, qf=12),
        width=dict(pi=16, qf=8),
        activation_fn=dict(pi=nn.ReLU, qf=nn.Tanh),
        norm=dict(pi="none", qf="layer"),
        residual=dict(pi=False, qf=True),
        residual_scale=dict(pi=1, qf=0.5),
    )
    model = SAC("DeepMlpPolicy", "Pendulum-v1", policy_kwargs=separate, device="cpu")
    actor, *critics = towers(model.policy)
    assert (len(actor.blocks), actor.output_dim, actor.blocks[0].residual) == (1, 16, False)
    kinds = {type(layer) for layer in actor.modules()}
    assert nn.ReLU in kinds and not kinds & {nn.LayerNorm, nn.SiLU, nn.Tanh}
    assert len(critics) == 4
    for critic in critics:
        assert (len(critic.blocks), critic.output_dim, critic.blocks[0].residual) == (3, 8, True)
        assert critic.blocks[0].scale == 0.5
        kinds = {type(layer) for layer in critic.modules()}
        assert {nn.Tanh, nn.LayerNorm} <= kinds and not kinds & {nn.SiLU, nn.ReLU}
    model.policy.save(tmp_path / "policy")
    assert_same(DeepSACPolicy.load(tmp_path / "policy", device="cpu"), model, observations(model))

    ppo = PPO("DeepMlpPolicy", "Pendulum-v1", policy_kwargs=dict(depth=dict(pi=4, vf=8), width=8), device="cpu")
    assert [len(tower.blocks) for tower in towers(ppo.policy)] == [1, 2]


def test_defaults_are_those_of_deepcrl():
    from sb3_deepcrl import DeepCRL

    expected = DeepCRL("MultiInputPolicy", GoalReachEnv(), device="cpu").actor.tower
    tower = SAC("DeepMultiInputPolicy", GoalReachEnv(), device="cpu").actor.latent_pi[0]
    assert repr(tower) == repr(expected)
    assert [parameter.shape for parameter in tower.parameters()] == [parameter.shape for parameter in expected.parameters()]


def test_more_critics():
    model = make_model("SAC", policy_kwargs=dict(n_critics=3)).learn(200)
    assert len(model.critic.q_networks) == 3 and len(towers(model.critic)) == 3
    assert len({vector(tower).sum().item() for tower in towers(model.critic)}) == 3


@pytest.mark.parametrize(
    ("algorithm", "policy_kwargs", "match"),
    [
        (SAC, dict(depth=6), "`depth` must be a positive multiple of 4.*got 6: use 4 or 8"),
        (SAC, dict(depth=dict(pi=4, qf=0)), r"`depth\['qf'\]` must be a positive multiple of 4"),
        (SAC, dict(depth=dict(pi=4, vf=8)), "`depth` must be one value or a dict with the keys 'pi' and 'qf', got .*'vf': 8"),
        (PPO, dict(norm=dict(pi="none")), "`norm` must be one value or a dict with the keys 'pi' and 'vf'"),
        (DQN, dict(depth=dict(qf=4)), "`depth` must be one value as this policy has a single network"),
        (TD3, dict(width=dict(pi=8, qf=2.5)), r"`width\['qf'\]` must be a positive integer, got 2.5"),
        (DDPG, dict(norm="batch"), '`norm` must be "layer", "none", or a class.*got \'batch\''),
        (A2C, dict(residual_scale=-1), "`residual_scale` must be a positive number.*got -1"),
        (SAC, dict(activation_fn="relu"), "`activation_fn` must be the class of an activation.*got 'relu'"),
        (PPO, dict(activation_fn=dict(pi=nn.ReLU, vf=nn.ReLU())), r"`activation_fn` must be the class.*got ReLU\(\)"),
        (TD3, dict(optimizer_class="adam"), "`optimizer_class` must be Optimizer.*got 'adam'.*`th.optim.Adam`"),
        (PPO, dict(optimizer_kwargs=dict(lr=0.1)), "`optimizer_kwargs` has `lr=0.1`.*`learning_rate`"),
        (DQN, dict(features_extractor_class=nn.ReLU()), r"`features_extractor_class` must be.*got ReLU\(\)"),
    ],
)
def test_wrong_arguments(algorithm, policy_kwargs, match):
    env = "CartPole-v1" if algorithm is DQN else "Pendulum-v1"
    with pytest.raises(ValueError, match=match):
        algorithm("DeepMlpPolicy", env, policy_kwargs=policy_kwargs, device="cpu")


def test_unknown_argument():
    with pytest.raises(TypeError, match="dept"):
        SAC("DeepMlpPolicy", "Pendulum-v1", policy_kwargs=dict(dept=8))


def test_net_arch_is_not_ignored_silently():
    with pytest.warns(UserWarning, match=r"`net_arch=\[64, 64\]`, which deep policies do not use.*`depth` and `width`"):
        model = make_model("TD3", policy_kwargs=dict(net_arch=[64, 64]))
    assert [tower.output_dim for tower in towers(model.actor)] == [8]


def test_dict_observations_need_the_policy_for_them():
    with pytest.raises(ValueError, match="must use `DeepMultiInputPolicy`"):
        SAC("DeepMlpPolicy", GoalReachEnv(), policy_kwargs=dict(depth=4, width=8))


@pytest.mark.parametrize("ortho_init", [True, False])
def test_orthogonal_initialization_is_that_of_the_heads(ortho_init):
    model = make_model("PPO", "DeepCnnPolicy", policy_kwargs=dict(ortho_init=ortho_init))
    policy = model.policy
    assert policy.ortho_init == ortho_init
    gain = policy.action_net.weight.norm(dim=1)
    assert bool((gain < 0.011).all()) == ortho_init
    kernel = policy.features_extractor.cnn[0].weight.flatten(1)
    assert th.allclose(kernel @ kernel.T, 2 * th.eye(len(kernel)), atol=1e-4) == ortho_init


# --- Single algorithms ----------------------------------------------------------------------------------------------------


def test_crossq_normalizes_over_the_batch_everywhere():
    layers = pytest.importorskip("sb3_contrib.common.torch_layers")
    model = make_model("CrossQ", policy_kwargs=dict(renorm_warmup_steps=7, batch_norm_momentum=0.5))

    def norms(network: nn.Module) -> list[nn.Module]:
        return [layer for layer in network.modules() if isinstance(layer, (layers.BatchRenorm1d, nn.LayerNorm))]

    # Inputs, first layer, block of four, features in front of the head
    for network in (model.actor, *model.critic.q_networks):
        assert [type(layer) for layer in norms(network)] == [layers.BatchRenorm1d] * 7
        assert all((layer.warmup_steps, layer.momentum) == (7, 0.5) for layer in norms(network))
    assert isinstance(model.critic.q_networks[0][-1], nn.Linear)
    model.learn(200)
    # CrossQ updates the statistics of critic and actor at different times, the latter at each third update
    assert {layer.steps.item() for layer in norms(model.critic)} == {50}
    assert {layer.steps.item() for layer in norms(model.actor)} == {16}

    with pytest.raises(ValueError, match=r"`norm` must be .*batch_renorm.*got 'batch'"):
        make_model("CrossQ", policy_kwargs=dict(norm="batch"))
    plain = make_model("CrossQ", policy_kwargs=dict(norm=dict(pi="none", qf="layer"), batch_norm=False))
    assert norms(plain.actor) == []
    assert {type(layer) for layer in norms(plain.critic)} == {nn.LayerNorm}


def test_trpo_tells_actor_and_critic_apart():
    """It does so by the names of the parameters. Only the critic has an optimizer."""
    model = make_model("TRPO", learning_rate=0.0)
    value_net, policy_net = model.policy.mlp_extractor.value_net, model.policy.mlp_extractor.policy_net
    before = vector(value_net), vector(policy_net)
    model.learn(100)
    assert th.equal(vector(value_net), before[0]) and not th.equal(vector(policy_net), before[1])


@pytest.mark.parametrize("alias", ["MlpPolicy", "CnnPolicy", "MultiInputPolicy"])
def test_features_extractor(alias, tmp_path):
    kwargs = dict(features_extractor_class=DeepResidualExtractor, features_extractor_kwargs=dict(depth=8, width=8))
    env = env_of(f"Deep{alias}", True)
    model = PPO(alias, env, n_steps=100, batch_size=50, policy_kwargs=dict(net_arch=[], **kwargs), seed=0, device="cpu")
    (tower,) = towers(model.policy)
    assert len(tower.blocks) == 2 and model.policy.mlp_extractor.latent_dim_pi == 8
    before = vector(tower)
    model.learn(200)
    assert not th.equal(vector(tower), before)
    model.save(tmp_path / "model")
    assert_same(PPO.load(tmp_path / "model", device="cpu"), model, observations(model))


def test_features_extractor_of_an_algorithm_without_deep_policy():
    contrib = pytest.importorskip("sb3_contrib")
    kwargs = dict(features_extractor_class=DeepResidualExtractor, features_extractor_kwargs=dict(depth=4, width=8))
    env = env_of("DeepMlpPolicy", True)
    model = contrib.RecurrentPPO("MlpLstmPolicy", env, n_steps=50, batch_size=50, policy_kwargs=kwargs, device="cpu")
    before = vector(model.policy.features_extractor)
    model.learn(50)
    assert not th.equal(vector(model.policy.features_extractor), before)


def test_features_extractor_made_by_a_function():
    make = partial(CombinedExtractor, cnn_output_dim=4)
    kwargs = dict(depth=4, width=8, features_extractor_class=make)
    assert SAC("DeepMultiInputPolicy", SimpleMultiObsEnv(discrete_actions=False), policy_kwargs=kwargs).learn(10)


@pytest.mark.parametrize("name", ["SAC", "PPO", "DQN", "QRDQN"])
def test_actions_are_numbers(name):
    model = make_model(name)
    observation = np.zeros(model.observation_space.shape, np.float32)
    with pytest.raises(ValueError, match=r"`observation` of the observation is nan at \(1,\)"):
        model.predict(np.insert(observation[1:], 1, np.nan), deterministic=True)
    with pytest.raises(ValueError, match="observation shape"):
        model.predict(observation[1:], deterministic=True)
    with pytest.raises(ValueError, match="passed a tuple"):
        model.predict((observation, {}), deterministic=True)
    for parameter in model.policy.parameters():
        parameter.data.fill_(np.nan)
    with pytest.raises(ValueError, match="are not finite, since training diverged"):
        model.predict(observation, deterministic=True)


def test_features_extractor_of_normalized_images():
    space = gym.spaces.Box(0.0, 1.0, (1, 36, 36))
    assert isinstance(DeepResidualExtractor(space, 4, 8, normalized_image=True).extractor, NatureCNN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (gym.spaces.Box(-1.0, 1.0, (5, 5, 3)), gym.spaces.Box(-10.0, 10.0, (1, 36, 36))):
            DeepResidualExtractor(other, 4, 8)
    with pytest.warns(UserWarning, match="may be an image, but is flattened: for a CNN pass"):
        extractor = DeepResidualExtractor(space, 4, 8)
    assert extractor(th.rand(3, 1, 36, 36)).shape == (3, extractor.features_dim)
    with pytest.raises(ValueError, match="`width`"):
        DeepResidualExtractor(space, width=0)


# --- Compile --------------------------------------------------------------------------------------------------------------


@needs_compiler
def test_compiled_policy_learns_and_saves_the_same(tmp_path):
    plain = make_model("SAC").learn(160)
    compiled = make_model("SAC")
    assert compile_blocks(compiled.policy)
    compiled.learn(160)
    th.testing.assert_close(vector(compiled.policy), vector(plain.policy), rtol=1e-4, atol=1e-5)
    compiled.save(tmp_path / "model")
    loaded = SAC.load(tmp_path / "model", device="cpu")
    assert list(loaded.policy.state_dict()) == list(plain.policy.state_dict())
    assert all(block._compiled_call_impl is None for block in residual_blocks(loaded.policy))
    obs = observations(plain)
    np.testing.assert_allclose(compiled.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0], 1e-4)


# --- Registry -------------------------------------------------------------------------------------------------------------


def test_register_is_idempotent_and_reversible():
    def aliases() -> dict:
        return {algorithm: dict(algorithm.policy_aliases) for algorithm in POLICIES}

    registered = aliases()
    register_policies()
    assert aliases() == registered
    for _ in range(2):
        unregister_policies()
        assert not any(name.startswith("Deep") for names in aliases().values() for name in names)
    with pytest.raises(ValueError, match="DeepMlpPolicy unknown"):
        SAC("DeepMlpPolicy", "Pendulum-v1")
    register_policies()
    assert aliases() == registered


def test_names_of_others_are_left_alone(monkeypatch):
    monkeypatch.setitem(SAC.policy_aliases, "DeepMlpPolicy", MlpPolicy)
    with pytest.warns(UserWarning, match="SAC has another policy named DeepMlpPolicy already.*use the class .*DeepSACPolicy"):
        register_policies()
    assert SAC.policy_aliases["DeepMlpPolicy"] is MlpPolicy
    unregister_policies()
    assert SAC.policy_aliases["DeepMlpPolicy"] is MlpPolicy
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_policies()
    assert SAC.policy_aliases["DeepMlpPolicy"] is DeepSACPolicy


def test_paths_of_the_classes_are_part_of_the_file_format():
    pytest.importorskip("sb3_contrib")
    for algorithm, policies in POLICIES.items():
        room = "contrib_policies" if algorithm.__name__ in ("TQC", "CrossQ", "QRDQN") else "policies"
        for policy in policies:
            assert policy.__module__ == f"sb3_deepcrl.deep_policies.{room}"
            assert pickle.loads(pickle.dumps(policy)) is policy


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import sb3_deepcrl; from sb3_contrib import TQC",
        "from sb3_contrib import TQC; import sb3_deepcrl",
        # As when a saved policy is unpickled
        "import sb3_deepcrl.deep_policies.contrib_policies; from sb3_contrib import TQC",
    ],
)
def test_contrib_in_any_order(code):
    pytest.importorskip("sb3_contrib")
    names = run_python(f"{code}; print(*(name for name in TQC.policy_aliases if name.startswith('Deep')))")
    assert names == " ".join(NAMES)


def test_without_contrib():
    code = (
        "import sys, warnings; warnings.simplefilter('error'); sys.modules['sb3_contrib'] = None\n"
        "import sb3_deepcrl; from stable_baselines3 import SAC; print('DeepMlpPolicy' in SAC.policy_aliases)"
    )
    assert run_python(code) == "True"


def test_contrib_that_does_not_fit():
    pytest.importorskip("sb3_contrib")
    code = (
        "import warnings, sb3_contrib; del sb3_contrib.CrossQ\n"
        "with warnings.catch_warnings(record=True) as told:\n    import sb3_deepcrl\n"
        "from stable_baselines3 import SAC; print(told[0].message, 'DeepMlpPolicy' in SAC.policy_aliases)"
    )
    assert re.fullmatch(r"No deep policies for sb3-contrib .*'CrossQ'.*sb3-contrib>=2.9.* True", run_python(code))


def test_load_in_another_process(tmp_path):
    model = make_model("SAC")
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    code = (
        "from stable_baselines3 import SAC\nimport sb3_deepcrl, numpy as np\n"
        f"model = SAC.load({str(tmp_path / 'model')!r}, device='cpu')\n"
        f"policy = type(model.policy).load({str(tmp_path / 'policy')!r}, device='cpu')\n"
        "for loaded in (model, policy): print(loaded.predict(np.ones((1, 3)), deterministic=True)[0].item())"
    )
    action = model.predict(np.ones((1, 3)), deterministic=True)[0].item()
    assert run_python(code).splitlines() == [str(action), str(action)]


def test_zoo_takes_the_name_from_a_yaml(tmp_path):
    pytest.importorskip("rl_zoo3")
    config = tmp_path / "sac.yml"
    config.write_text(
        "PointUMaze-v0:\n"
        "  n_timesteps: 120\n"
        "  policy: 'DeepMultiInputPolicy'\n"
        '  policy_kwargs: "dict(depth=dict(pi=4, qf=8), width=8)"\n'
        "  learning_starts: 110\n"
        "  batch_size: 8\n"
        "  buffer_size: 1000\n"
        "  replay_buffer_class: HerReplayBuffer\n"
        "  env_kwargs: {max_episode_steps: 50}\n"
    )
    command = ["-m", "rl_zoo3.train", "--algo", "sac", "--env", "PointUMaze-v0", "--gym-packages", "sb3_deepcrl"]
    command += ["-conf", str(config), "-f", str(tmp_path), "--eval-freq", "-1", "--device", "cpu"]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    model = SAC.load(
        tmp_path / "sac" / "PointUMaze-v0_1" / "PointUMaze-v0.zip", env=make_vec_env("PointUMaze-v0"), device="cpu"
    )
    assert [len(tower.blocks) for tower in towers(model.policy)] == [1, 2, 2, 2, 2]
    assert model._n_updates == 10


def test_value_based_policy_is_a_single_tower():
    model = DQN(DeepDQNPolicy, "CartPole-v1", policy_kwargs=dict(depth=8, width=8), device="cpu")
    assert [len(tower.blocks) for tower in towers(model.policy.q_net)] == [2]
