from copy import deepcopy

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TransformAction
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise
from torch._subclasses.fake_tensor import FakeTensorMode

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis.scale import count_operations
from sb3_deepcrl.common.evaluation import evaluate_goals
from sb3_deepcrl.deploy import distill, export_policy, make_student
from sb3_deepcrl.zoo.hyperparams_opt import sample_deepcrl_params
from tests.test_acceleration import fake, graph, needs_compiler

# Spaces of four actions, as the env takes them
SPACES = [spaces.Discrete(4), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)]


def index_of(actions: np.ndarray) -> np.ndarray:
    """Which of the four actions these are, shape ``(n, action_dim)``."""
    return actions[:, 0] if actions.shape[1] == 1 else 2 * actions[:, 0] + actions[:, 1]


def make_env(space: spaces.Space = SPACES[0]) -> gym.Env:
    """Four bits, of which an action flips one."""
    return TransformAction(BitFlippingEnv(n_bits=4), lambda action: index_of(np.reshape(action, (1, -1)))[0], space)


def make_model(space: spaces.Space = SPACES[0], **kwargs) -> DeepCRL:
    settings = dict(depth=4, width=16, batch_size=32, learning_starts=20, buffer_size=2000, seed=0, device="cpu")
    return DeepCRL("MultiInputPolicy", make_env(space), **{**settings, **kwargs})


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_learn_save_and_load(space, tmp_path):
    model = make_model(space).learn(60)
    stored = model.replay_buffer.actions.reshape(-1, *space.shape)
    assert all(space.contains(action.astype(space.dtype)) for action in stored) and len(np.unique(stored, axis=0)) == 4
    model.save(tmp_path / "model")
    loaded = DeepCRL.load(tmp_path / "model", env=make_env(space), device="cpu")
    observation, _ = make_env(space).reset(seed=0)
    for deterministic in (True, False):
        model.set_random_seed(0)
        action, _ = model.predict(observation, deterministic=deterministic)
        assert space.contains(action)
        loaded.set_random_seed(0)
        np.testing.assert_array_equal(loaded.predict(observation, deterministic=deterministic)[0], action)
    assert len(evaluate_goals(loaded, loaded.env, 3)) == 3
    assert loaded.learn(30, reset_num_timesteps=False).num_timesteps == 90


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_actor_acts_as_it_says(space):
    model = make_model(space)
    observation = {key: values.repeat(4000, 0) for key, values in model.env.reset().items()}
    with th.no_grad():
        model.actor.logits.bias.copy_(th.tensor([0.1, 0.7, 0.0, 0.2]).log())
        model.actor.logits.weight.zero_()
        probabilities = model.actor.get_action_dist_params(model.policy.obs_to_tensor(observation)[0])[0][0].exp()
    th.testing.assert_close(probabilities, th.tensor([0.1, 0.7, 0.0, 0.2]))
    sampled, best = (model.predict(observation, deterministic=value)[0].reshape(4000, -1) for value in (False, True))
    np.testing.assert_allclose(np.bincount(index_of(sampled), minlength=4) / 4000, [0.1, 0.7, 0.0, 0.2], atol=0.03)
    assert (index_of(best) == 1).all()


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_loss_is_the_mean_over_all_actions(space):
    model = make_model(space, random_goals=0.0, ent_coef=0.3).learn(40)
    observations, _ = model.replay_buffer.sample_contrastive(16)
    policy = deepcopy(model.policy)
    loss, log_prob, *_ = model._actor_loss(
        observations, model.critic.extract_state_features(observations), model.critic.encode_goal(observations), None
    )
    (log_probs,) = policy.actor.get_action_dist_params(observations)
    total = th.zeros(16)
    for i, action in enumerate(np.ndindex(*([4] if not space.shape else [2, 2]))):
        with th.no_grad():
            value = policy.critic(observations, th.tensor([action]).expand(16, -1)).squeeze(1)
        total = total + log_probs[:, i].exp() * (0.3 * log_probs[:, i] - value)
    th.testing.assert_close(loss, total.mean())
    th.testing.assert_close(-log_prob, th.distributions.Categorical(logits=log_probs).entropy().detach())
    model.actor.zero_grad()
    loss.backward()
    total.mean().backward()
    for parameter, wanted in zip(model.actor.parameters(), policy.actor.parameters(), strict=True):
        th.testing.assert_close(parameter.grad, wanted.grad)


def test_target_entropy():
    assert make_model().target_entropy == pytest.approx(0.75 * np.log(4))


def test_graphed_updates_are_the_same_updates():
    plain, graphed = (make_model().learn(40) for _ in range(2))
    backend = graph(graphed)
    for model in (plain, graphed):
        model.set_random_seed(1)
        model.train(8, 32)
    for actual, wanted in zip(graphed.policy.parameters(), plain.policy.parameters(), strict=True):
        assert th.equal(actual, wanted)
    assert backend.graphs[0].n_replays == 5


def test_update_reads_no_value():
    model = make_model().learn(40)
    batch, actions = model.replay_buffer.sample_contrastive(16)
    with FakeTensorMode():
        fake(model, "cpu")
        observations = {key: th.empty(value.shape) for key, value in batch.items()}
        assert model._update(observations, th.empty(actions.shape, dtype=actions.dtype)).shape == (12,)


@needs_compiler
def test_compiled_updates_are_the_same_updates():
    plain, compiled = (make_model(compile=compiled).learn(60) for compiled in (False, True))
    for actual, wanted in zip(compiled.policy.parameters(), plain.policy.parameters(), strict=True):
        th.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("space", "kwargs", "message"),
    [
        (spaces.Discrete(4, start=1), {}, r"Actions must be counted from 0, but `action_space` is Discrete\(4, start=1\)"),
        (spaces.MultiDiscrete([[2, 2], [2, 2]]), {}, r"Actions must be vectors, but `action_space` is MultiDiscrete"),
        (spaces.MultiBinary(11), {}, r"MultiBinary\(11\) has 2048 actions, .*: use at most 1024"),
        (SPACES[0], dict(action_noise=NormalActionNoise(np.zeros(1), np.ones(1))), r"`action_noise` needs continuous actions"),
    ],
)
def test_wrong_arguments(space, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(space, **kwargs)


@pytest.mark.parametrize("deterministic", [True, False])
def test_weights_that_diverged(deterministic):
    model = make_model()
    with th.no_grad():
        model.actor.logits.bias[2] = np.nan
    with pytest.raises(ValueError, match=r"the weights `logits.bias` are not finite"):
        model.predict(model.env.reset(), deterministic=deterministic)


def test_search():
    trial = optuna.create_study().ask()
    assert "target_entropy" not in sample_deepcrl_params(trial, n_actions=0, n_envs=1, additional_args={})


def test_operations_of_an_update():
    policies = [make_model(space).policy for space in (spaces.Discrete(8), spaces.Discrete(4))]
    layers = [module for module in policies[0].critic.sa_encoder.modules() if isinstance(module, th.nn.Linear)][1:]
    # A forward pass of the encoder for each action, a little less than the difference, as there are more logits and inputs too
    difference = count_operations(policies[0], 8) - count_operations(policies[1], 8)
    one_pass = 2 * 8 * sum(layer.in_features * layer.out_features for layer in layers)
    assert 4 * one_pass < difference < 6 * one_pass


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_policy_taken_along(space, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make_model(space).learn(200)
    student = distill(model, depth=4, width=32, steps=1200)
    observations, _ = model.replay_buffer.sample_contrastive(200)
    with th.no_grad():
        probabilities = [
            m.actor.get_action_dist_params(observations)[0].exp() for m in (model, student, make_student(model, 4))
        ]
    learned, fresh = ((probabilities[0] - other).abs().sum(dim=1).mean() for other in probabilities[1:])
    assert learned < 0.5 * fresh
    raw = {key: np.stack([make_env(space).reset(seed=i)[0][key] for i in range(9)]) for key in observations}
    session = onnxruntime.InferenceSession(export_policy(model, tmp_path / "policy"))
    (found,) = session.run(["action"], {value.name: raw[value.name] for value in session.get_inputs()})
    np.testing.assert_array_equal(found, model.predict(raw, deterministic=True)[0])
