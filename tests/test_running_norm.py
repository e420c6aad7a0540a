from copy import deepcopy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.common.running_norm import RunningNorm
from sb3_deepcrl.deepcrl import MultiInputPolicy
from sb3_deepcrl.deepcrl.policies import GaussianActor
from tests.envs import GoalReachEnv
from tests.test_deepcrl import make_model

VECTOR = spaces.Box(-np.inf, np.inf, (2,))
GOAL_SPACES = dict(observation=VECTOR, achieved_goal=VECTOR, desired_goal=VECTOR)


def check_statistics(model: DeepCRL) -> None:
    """That the statistics are those of the states in the replay buffer from which transitions start, of all envs."""
    normalizer, buffer = model.actor.normalizer, model.replay_buffer
    assert normalizer is model.critic.normalizer
    stored = buffer.remaining != 0
    assert normalizer.count == stored.sum() > 0
    for key, columns in normalizer.columns.items():
        states = buffer._observations[key][stored].astype(np.float64)
        np.testing.assert_allclose(normalizer.mean[columns], states.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(normalizer.var[columns], states.var(axis=0), rtol=1e-12)


class Interrupt(BaseCallback):
    def _on_step(self) -> bool:
        if self.n_calls == 13:
            raise KeyboardInterrupt
        return True


def test_statistics_are_those_of_what_was_collected():
    env = make_vec_env(lambda: GoalReachEnv(obs_dtype=np.float32), 3)
    model = make_model(env, normalize_observations=True, learning_starts=50, train_freq=7)
    # Warm-up, part of a rollout, and the rest of it
    for total_timesteps in (33, 60, 45):
        model.learn(total_timesteps, reset_num_timesteps=False)
        check_statistics(model)
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=Interrupt(), reset_num_timesteps=False)
    # The transition of that step was not stored
    check_statistics(model)
    assert model.actor.normalizer.count == 138 + 3 * 12


def test_updates_after_a_rollout_see_the_same_statistics(monkeypatch):
    model = make_model(normalize_observations=True, train_freq=5, gradient_steps=4)
    counts = []
    update = model._runner.own_update
    model._runner.own_update = lambda *args: (counts.append(model.actor.normalizer.count.item()), update(*args))[1]
    model.learn(50)
    assert counts == [count for count in (30, 40, 50) for _ in range(4)]


def test_normalized_observations():
    image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    norm = RunningNorm(spaces.Dict(**GOAL_SPACES, scalar=spaces.Box(-1, 1, ()), image=image, flag=spaces.MultiBinary(2)))
    rows = np.array([[0.0, 5.0], [2.0, 5.0]], dtype=np.float32)
    observations = {key: rows for key in GOAL_SPACES}
    observations.update(scalar=np.array([1.0, 5.0]), image=np.full((2, 36, 36, 1), 9, np.uint8), flag=np.array([[0, 1]] * 2))
    tensors = {key: th.as_tensor(values) for key, values in observations.items()}
    far = {"achieved_goal": th.tensor([[101.0, 5.5]]), "observation": th.tensor([[101.0, 5.5]])}
    # As they are before the first update
    norm.add({**observations, "desired_goal": rows + 1000})
    for values in (tensors, far):
        assert all(th.equal(norm(values)[key], value) for key, value in values.items())
    norm.update()
    normalized = norm(tensors)
    # What never changed is centered
    for key in GOAL_SPACES:
        assert normalized[key].tolist() == [[-1, 0], [1, 0]] and normalized[key].dtype == th.float32
    assert normalized["scalar"].tolist() == [-1, 1]
    for key in ("image", "flag"):
        assert normalized[key] is tensors[key]
    # Goals are scaled alike in all directions and are not clipped
    assert norm(far)["observation"].tolist() == [[10, 0.5]]
    assert norm(far)["achieved_goal"].tolist() == [[100, 0.5]]
    assert norm({"desired_goal": far["achieved_goal"]})["desired_goal"].tolist() == [[100, 0.5]]


def test_directions_to_goals_are_kept():
    norm = RunningNorm(spaces.Dict(GOAL_SPACES))
    # The second coordinate varies a hundredth as much as the first one
    rows = th.tensor([[0.0, 1.0], [4.0, 1.04]])
    norm.add({key: rows for key in GOAL_SPACES})
    norm.update()
    normalized = norm({"achieved_goal": rows, "observation": rows})
    th.testing.assert_close(normalized["achieved_goal"], th.tensor([[-1.0, -0.01], [1.0, 0.01]]))
    th.testing.assert_close(normalized["observation"], th.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4, rtol=0)


def test_noise_on_a_state_dict_gives_numbers():
    norm = RunningNorm(spaces.Dict(GOAL_SPACES))
    norm.load_state_dict({name: values - 1.5 for name, values in norm.state_dict().items()})
    assert norm({"observation": th.ones(1, 2)})["observation"].isfinite().all()


@pytest.mark.parametrize("space", [spaces.MultiBinary(3), spaces.Box(0, 255, (36, 36, 1), np.uint8)])
def test_nothing_to_normalize(space):
    norm = RunningNorm(spaces.Dict(achieved_goal=space, desired_goal=space))
    values = {"desired_goal": th.as_tensor(space.sample())[None]}
    norm.add({"achieved_goal": values["desired_goal"]})
    norm.update()
    assert norm(values)["desired_goal"] is values["desired_goal"]


def test_height_of_the_goal_does_not_matter_where_it_is_constant():
    class FlatEnv(GoalReachEnv):
        def __init__(self):
            super().__init__()
            goal = spaces.Box(-10.0, 10.0, (3,))
            self.observation_space = spaces.Dict({**self.observation_space, "achieved_goal": goal, "desired_goal": goal})

        def _observation(self):
            observation = super()._observation()
            # Wanted is a height that nothing has reached
            observation["achieved_goal"] = np.append(observation["achieved_goal"], 0.3)
            observation["desired_goal"] = np.append(observation["desired_goal"], 0.5)
            return observation

    model = make_model(make_vec_env(FlatEnv, 2), normalize_observations=True).learn(100)
    obs, _ = model.policy.obs_to_tensor(model.env.reset())
    normalized = model.actor.normalizer(obs)
    assert (normalized["desired_goal"][:, 2] - normalized["achieved_goal"][:, 2]).abs().max() < 0.3
    assert normalized["desired_goal"].abs().max() < 5


def test_statistics_go_where_the_policy_goes(tmp_path):
    model = make_model(normalize_observations=True).learn(100)
    observation = model.env.reset()
    observation["observation"] += 5
    expected, _ = model.predict(observation, deterministic=True)
    single, _ = model.predict({key: values[1] for key, values in observation.items()}, deterministic=True)
    np.testing.assert_allclose(single, expected[1], rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pkl")
    model.actor.save(tmp_path / "actor.pkl")
    other = make_model(normalize_observations=True, seed=5)
    addresses = [buffer.data_ptr() for buffer in other.policy.buffers()]
    other.set_parameters(model.get_parameters())
    copies = [
        DeepCRL.load(tmp_path / "model"),
        MultiInputPolicy.load(tmp_path / "policy.pkl"),
        GaussianActor.load(tmp_path / "actor.pkl"),
        deepcopy(model.policy),
        other,
    ]
    for policy in copies:
        np.testing.assert_array_equal(policy.predict(observation, deterministic=True)[0], expected)
    # A graph reads them where they were
    other.learn(50)
    assert other.actor.normalizer.count == 150 and model.actor.normalizer.count == 100
    assert addresses == [buffer.data_ptr() for buffer in other.policy.buffers()]
    # Both parts of a copy go on with the same
    assert copies[3].actor.normalizer is copies[3].critic.normalizer is not model.actor.normalizer


def test_load_with_or_without_normalization(tmp_path):
    make_model().save(tmp_path / "raw")
    make_model(policy_kwargs=dict(normalize_observations=True)).save(tmp_path / "normalized")
    assert DeepCRL.load(tmp_path / "normalized").normalize_observations is True
    with pytest.raises(
        ValueError, match=r"saved with `normalize_observations=False`.*with `normalize_observations=True`: leave"
    ):
        DeepCRL.load(tmp_path / "raw", normalize_observations=True)


def test_vec_normalize_as_well():
    env = VecNormalize(make_vec_env(lambda: GoalReachEnv(obs_dtype=np.float32), 2))
    message = r"would normalize the observations twice.*VecNormalize\(env, norm_obs=False\)"
    with pytest.raises(ValueError, match=message):
        make_model(env, normalize_observations=True)
    env.norm_obs = False
    model = make_model(env, normalize_observations=True)
    check_statistics(model.learn(50))
    model.set_env(VecNormalize(make_vec_env(lambda: GoalReachEnv(obs_dtype=np.float32), 2)))
    for learn in (model.learn, model.learn_offline):
        with pytest.raises(ValueError, match=message):
            learn(50)


def test_truth_values():
    norm = RunningNorm(spaces.Dict(GOAL_SPACES, on=spaces.Box(0, 1, (2,), bool)))
    zeros = np.zeros((4, 2))
    norm.add({"observation": zeros, "achieved_goal": zeros, "on": np.array([[True, False], [False, False]] * 2)})
    norm.update()
    th.testing.assert_close(norm({"on": th.tensor([[True, False]])})["on"], th.tensor([[1.0, 0.0]]))
