import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_deepcrl import ContrastiveReplayBuffer
from sb3_deepcrl.common import buffers
from tests.envs import EpisodeCounterEnv, GoalReachEnv


def counter_env(n_envs: int = 1, lengths: tuple[int, ...] = (5, 3, 9)) -> DummyVecEnv:
    return DummyVecEnv(
        [lambda index=index: EpisodeCounterEnv(index, lengths[index:] + lengths[:index]) for index in range(n_envs)]
    )


def make_buffer(env, buffer_size: int = 1000, **kwargs) -> ContrastiveReplayBuffer:
    return ContrastiveReplayBuffer(
        buffer_size, env.observation_space, env.action_space, device="cpu", n_envs=env.num_envs, **kwargs
    )


def collect(buffer: ContrastiveReplayBuffer, env, n_steps: int, obs=None):
    """Fill the buffer as OffPolicyAlgorithm does, and return the last observation."""
    obs = env.reset() if obs is None else obs
    for _ in range(n_steps):
        actions = np.stack([env.action_space.sample() for _ in range(env.num_envs)])
        new_obs, rewards, dones, infos = env.step(actions)
        next_obs = copy.deepcopy(new_obs)
        for index in np.flatnonzero(dones):
            for key in next_obs:
                next_obs[key][index] = infos[index]["terminal_observation"][key]
        buffer.add(obs, next_obs, actions, rewards, dones, infos)
        obs = new_obs
    return obs


def check_samples(buffer: ContrastiveReplayBuffer, n_samples: int = 2000) -> None:
    """Each goal is from a later step of the same episode of the same env, and the next observation from the next step."""
    samples = buffer.sample(n_samples)
    state, goal = samples.observations["achieved_goal"], samples.observations["desired_goal"]
    assert (goal[:, :2] == state[:, :2]).all()
    assert (goal[:, 2] > state[:, 2]).all()
    assert (samples.next_observations["achieved_goal"] == state + th.tensor([0.0, 0.0, 1.0])).all()
    assert (samples.next_observations["desired_goal"] == goal).all()


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("capacity", [9, 40, 1000])
def test_goals_come_from_the_future_of_the_same_episode(n_envs, capacity):
    env = counter_env(n_envs)
    buffer = make_buffer(env, capacity * n_envs)
    obs = None
    # Often enough to see every position of the ring, running episodes and overwritten ones
    for _ in range(60):
        obs = collect(buffer, env, 3, obs)
        check_samples(buffer, 300)


def test_warning_of_a_buffer_that_does_not_fit_in_memory(monkeypatch):
    memory = SimpleNamespace(available=10_000)
    monkeypatch.setattr(buffers, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    with pytest.warns(UserWarning, match=r"only 0\.0 GB of memory are free: use a smaller `buffer_size`"):
        make_buffer(counter_env())


def test_every_transition_is_sampled_equally_often():
    env = counter_env(2)
    buffer = make_buffer(env)
    collect(buffer, env, 40)
    n_samples = 80_000
    samples = buffer.sample(n_samples)
    _, counts = np.unique(samples.observations["achieved_goal"].numpy(), axis=0, return_counts=True)
    assert len(counts) == 80
    # Poisson law: 1000 +- 32 each
    assert abs(counts - 1000).max() < 5 * 32


def test_oldest_transitions_are_overwritten():
    env = counter_env(1, (4,))
    buffer = make_buffer(env, 20)
    collect(buffer, env, 100)
    episodes = np.unique(buffer.sample(1000).observations["achieved_goal"][:, 1].numpy())
    assert list(episodes) == [21, 22, 23, 24]
    # 22 slots: the head, the last states of five episodes and the transitions of four
    assert buffer.size() == 16


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("done", [True, False])
def test_goal_law_is_a_truncated_geometric_one(gamma, done):
    length = 12
    env = counter_env(1, (length if done else 1000,))
    buffer = make_buffer(env, gamma=gamma)
    collect(buffer, env, length)
    samples = buffer.sample(200_000)
    step, goal = samples.observations["achieved_goal"][:, 2], samples.observations["desired_goal"][:, 2]
    for start in (0, 5, 10, 11):
        distances = (goal - step)[step == start].numpy().astype(int)
        horizon = length - start
        expected = gamma ** np.arange(1, horizon + 1)
        expected /= expected.sum()
        found = np.bincount(distances, minlength=horizon + 1)[1:] / len(distances)
        assert len(found) == horizon
        np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / len(distances)))


def test_limits_of_the_goal_law():
    env = counter_env(1, (10,))
    buffer = make_buffer(env, gamma=0.0)
    collect(buffer, env, 10)
    samples = buffer.sample(1000)
    assert (samples.observations["desired_goal"][:, 2] == samples.observations["achieved_goal"][:, 2] + 1).all()
    buffer.gamma = 1.0
    samples = buffer.sample(100_000)
    from_start = samples.observations["desired_goal"][samples.observations["achieved_goal"][:, 2] == 0][:, 2]
    np.testing.assert_allclose(np.bincount(from_start.numpy().astype(int))[1:] / len(from_start), 0.1, atol=0.02)


def test_env_reset_behind_the_buffers_back():
    env = counter_env(2, (9, 7))
    buffer = make_buffer(env)
    for _ in range(20):
        # Starts with a reset, in the middle of an episode
        collect(buffer, env, 4)
        check_samples(buffer, 200)


def test_env_reset_to_the_same_achieved_goal():
    env = counter_env(1, (9,))
    buffer = make_buffer(env)
    for episode in range(5):
        obs = env.reset()
        for step in range(4):
            # The object to be moved stays where it is
            obs["achieved_goal"][:] = 0.0
            obs["observation"][:] = [[0.0, episode, step]]
            next_obs = copy.deepcopy(obs)
            next_obs["observation"][:, 2] += 1
            buffer.add(obs, next_obs, np.zeros((1, 1)), np.zeros(1), np.zeros(1, dtype=bool), [{}])
    samples = buffer.sample(500)
    state, following = samples.observations["observation"], samples.next_observations["observation"]
    assert (following == state + th.tensor([0.0, 0.0, 1.0])).all()
    assert (buffer.remaining > 0).sum() == 16


@pytest.mark.parametrize("method", ["_advance", "_end_episodes"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_interruption_while_adding(method, call, moment, monkeypatch):
    env = counter_env(2, (4, 6))
    for n_steps in range(2, 8):
        buffer = make_buffer(env, 40)
        obs = collect(buffer, env, 10 + n_steps)
        original, calls = getattr(buffer, method), []

        def interrupted(*args, original=original, calls=calls, **kwargs):
            calls.append(1)
            if moment == "after":
                original(*args, **kwargs)
            if len(calls) == call:
                raise KeyboardInterrupt
            if moment == "before":
                original(*args, **kwargs)

        monkeypatch.setattr(buffer, method, interrupted)
        try:
            collect(buffer, env, 1, obs)
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        buffer.truncate_last_trajectory()
        for _ in range(15):
            collect(buffer, env, 3)
            check_samples(buffer, 300)


def test_truncate_last_trajectory():
    env = counter_env(2, (9, 9))
    buffer = make_buffer(env)
    obs = collect(buffer, env, 4)
    buffer.truncate_last_trajectory()
    # The same episode goes on, but nobody must look from before the cut to behind it
    collect(buffer, env, 3, obs)
    samples = buffer.sample(2000)
    step, goal = samples.observations["achieved_goal"][:, 2], samples.observations["desired_goal"][:, 2]
    assert (goal[step < 4] <= 4).all()
    assert (goal[step >= 4] > 4).all()
    check_samples(buffer)
    # A second time there is nothing to cut
    buffer.truncate_last_trajectory()
    head = buffer.head.copy()
    buffer.truncate_last_trajectory()
    assert (buffer.head == head).all()


def test_observations_are_stored_once_and_as_float32():
    env = DummyVecEnv([GoalReachEnv])
    buffer, her = make_buffer(env, 10_000), HerReplayBuffer(10_000, env.observation_space, env.action_space, env=env)
    assert {values.dtype for values in buffer.observations.values()} == {np.dtype(np.float32)}
    n_bytes = sum(values.nbytes for values in buffer._observations.values())
    her_bytes = sum(values.nbytes for obs in (her.observations, her.next_observations) for values in obs.values())
    assert n_bytes < 0.26 * her_bytes


def test_images_stay_uint8():
    image = spaces.Box(0, 255, (3, 8, 8), np.uint8)
    space = spaces.Dict(observation=spaces.Discrete(5), achieved_goal=image, desired_goal=image)
    buffer = ContrastiveReplayBuffer(10, space, spaces.Box(-1, 1, (2,)), device="cpu")
    assert buffer.observations["achieved_goal"].dtype == np.uint8
    obs = {key: np.array([value.sample()]) for key, value in space.spaces.items()}
    next_obs = {key: np.array([value.sample()]) for key, value in space.spaces.items()}
    buffer.add(obs, next_obs, np.zeros((1, 2)), np.zeros(1), np.zeros(1, dtype=bool), [{}])
    samples = buffer.sample(4)
    assert samples.observations["desired_goal"].dtype == th.uint8
    assert (samples.observations["desired_goal"].numpy() == next_obs["achieved_goal"]).all()


def test_rewards_dones_and_timeouts():
    env = counter_env(1, (2,))
    buffer = make_buffer(env)
    collect(buffer, env, 8)
    samples = buffer.sample(1000)
    last = samples.observations["achieved_goal"][:, 2] == 1
    terminated = samples.observations["achieved_goal"][:, 1] % 2 == 0
    # Ends by timeout are no ends for the value
    assert (samples.dones.squeeze(1).bool() == (last & terminated)).all()
    assert samples.rewards.shape == (1000, 1)


def test_sample_contrastive_is_what_sample_gives():
    env = counter_env(2)
    buffer = make_buffer(env)
    collect(buffer, env, 30)
    np.random.seed(1)
    samples = buffer.sample(50)
    np.random.seed(1)
    observations, actions = buffer.sample_contrastive(50)
    assert (actions == samples.actions).all()
    for key, values in observations.items():
        assert (values == samples.observations[key]).all()


def test_vec_normalize():
    env = VecNormalize(DummyVecEnv([GoalReachEnv]))
    buffer = make_buffer(env)
    collect(buffer, env.venv, 50)
    env.reset()
    env.step(np.zeros((1, 2)))
    np.random.seed(1)
    raw = buffer.sample(20)
    np.random.seed(1)
    normalized = buffer.sample(20, env=env)
    expected = env.normalize_obs({key: values.numpy() for key, values in raw.observations.items()})
    for key, values in normalized.observations.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-5, atol=1e-6)
    assert not np.allclose(normalized.observations["desired_goal"], raw.observations["desired_goal"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_copies_go_on_independently(duplicate):
    env = counter_env(2)
    buffer = make_buffer(env)
    obs = collect(buffer, env, 7)
    twin = duplicate(buffer)
    collect(twin, env, 20, obs)
    check_samples(twin)
    assert buffer.size() == 7
    assert twin.size() == 27


@pytest.mark.parametrize("n_steps", [0, 7, 60])
def test_files_hold_what_was_used(n_steps):
    env = counter_env(2)
    buffer = make_buffer(env, buffer_size=100)
    collect(buffer, env, n_steps)
    large = make_buffer(env, buffer_size=100_000)
    large_obs = collect(large, env, n_steps)
    assert len(pickle.dumps(large)) < 20_000
    twin = pickle.loads(pickle.dumps(buffer))
    for name, values in {**buffer._observations, **vars(buffer)}.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal({**twin._observations, **vars(twin)}[name], values)
    large_twin = pickle.loads(pickle.dumps(large))
    assert large_twin.n_slots == large.n_slots
    collect(large_twin, env, 120, large_obs)
    check_samples(large_twin)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("capacity", [9, 40, 1000])
def test_arrays_are_the_stored_transitions_in_order(n_envs, capacity):
    env = counter_env(n_envs)
    buffer = make_buffer(env, capacity * n_envs)
    added, add = [], buffer.add
    buffer.add = lambda *args: (added.append(copy.deepcopy(args)), add(*args))
    obs = None
    for _ in range(30):
        obs = collect(buffer, env, 3, obs)
        size = buffer.size()
        assert size == min(np.count_nonzero(buffer.remaining, axis=0))
        for length in (size, buffer.buffer_size if buffer.full else buffer.pos):
            for key in obs:
                expected = np.array([(args[0][key], args[1][key]) for args in added[-size:]], dtype=np.float32)
                np.testing.assert_array_equal(buffer.observations[key][:length], expected[:, 0])
                np.testing.assert_array_equal(buffer.next_observations[key][:length], expected[:, 1])
            for name, index in (("actions", 2), ("rewards", 3), ("dones", 4)):
                np.testing.assert_array_equal(getattr(buffer, name)[:length], [args[index] for args in added[-size:]])
            timeouts = [[info["TimeLimit.truncated"] for info in args[5]] for args in added[-size:]]
            np.testing.assert_array_equal(buffer.timeouts[:length], timeouts)
    # SB3's order of a ring that is full
    np.testing.assert_array_equal(np.roll(buffer.actions, -buffer.pos if buffer.full else 0, axis=0), buffer.actions)
    buffer.reset()
    assert len(buffer.actions) == len(buffer.next_observations["observation"]) == 0


def test_arrays_are_copied_once_and_cannot_be_written():
    env = counter_env(2, (9, 9))
    buffer = make_buffer(env)
    obs = collect(buffer, env, 7)
    assert buffer.next_observations is buffer.next_observations
    for array in (buffer.rewards, buffer.next_observations["observation"]):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 1.0
    collect(buffer, env, 1, obs)
    assert len(buffer.rewards) == 8
    assert not buffer.dones[7].any()
    buffer.truncate_last_trajectory()
    assert buffer.dones[7].all()


def test_nothing_or_hardly_anything_left_to_sample():
    env = counter_env(2, (10**6,))
    buffer = make_buffer(env, 10_000)
    obs = collect(buffer, env, 500)
    # As if Ctrl-C had interrupted `add`: the running episodes are dropped
    buffer._adding = True
    buffer.truncate_last_trajectory()
    assert buffer.size() == buffer.pos == 0
    with pytest.raises(ValueError, match="empty replay buffer"):
        buffer.sample(4)
    collect(buffer, env, 1, obs)
    assert (buffer.sample(1000).observations["achieved_goal"][:, 2] == 500).all()
    assert buffer.size() == len(buffer.actions) == 1


def test_reset():
    env = counter_env(2)
    buffer = make_buffer(env)
    collect(buffer, env, 7)
    buffer.reset()
    assert buffer.size() == 0
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    collect(buffer, env, 2)
    check_samples(buffer)


def test_sample_from_empty_buffer():
    with pytest.raises(ValueError, match="empty replay buffer"):
        make_buffer(counter_env()).sample(1)


@pytest.mark.parametrize("gamma", [-0.1, 1.01, np.nan])
def test_wrong_gamma(gamma):
    with pytest.raises(ValueError, match="`gamma` must be between 0 and 1"):
        make_buffer(counter_env(), gamma=gamma)
    env = counter_env()
    buffer = make_buffer(env)
    collect(buffer, env, 1)
    buffer.gamma = gamma
    with pytest.raises(ValueError, match="`gamma` must be between 0 and 1"):
        buffer.sample(1)


def test_optimize_memory_usage():
    with pytest.raises(ValueError, match="optimize_memory_usage=True"):
        make_buffer(counter_env(), optimize_memory_usage=True)


def test_env_reset_just_when_the_buffer_is_full_of_its_episode():
    env = counter_env(1, (100,))
    buffer = make_buffer(env, 8)
    for _ in range(3):
        collect(buffer, env, 8)
    check_samples(buffer)


@pytest.mark.parametrize("handle_timeout_termination", [True, False])
@pytest.mark.parametrize("capacity", [1, 8])
def test_episode_longer_than_the_buffer_is_truncated(capacity, handle_timeout_termination):
    env = counter_env(2, (10**6,))
    buffer = make_buffer(env, 2 * capacity, handle_timeout_termination=handle_timeout_termination)
    obs = None
    for n_steps in range(3, 60, 3):
        obs = collect(buffer, env, 3, obs)
        check_samples(buffer, 200)
        samples = buffer.sample(200)
        step, goal = (samples.observations[key][:, 2] for key in ("achieved_goal", "desired_goal"))
        assert (goal <= step - step % capacity + capacity).all()
        # The newest transition does not know yet
        step = buffer.observations["achieved_goal"][:, :, 2]
        cut = (step % capacity == capacity - 1) & (step < n_steps - 1)
        np.testing.assert_array_equal(buffer.dones, cut)
        np.testing.assert_array_equal(buffer.timeouts, cut & handle_timeout_termination)
    assert buffer.size() >= capacity
    # What is resumed goes on within the same piece
    buffer = pickle.loads(pickle.dumps(buffer))
    collect(buffer, env, 3 * capacity, obs)
    check_samples(buffer)


def test_rewards_are_not_needed():
    env = counter_env(2)
    buffer = make_buffer(env)
    obs = env.reset()
    next_obs, _, dones, infos = env.step(np.zeros((2, 1)))
    buffer.add(obs, next_obs, np.zeros((2, 1)), np.full(2, np.nan), dones, infos)
    assert buffer.size() == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("where", ["obs", "next_obs"])
def test_not_a_number(value, where):
    env = counter_env(3)
    buffer = make_buffer(env)
    obs = collect(buffer, env, 2)
    args = {"obs": obs, "next_obs": copy.deepcopy(obs)}
    args[where]["observation"][1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinity in `observation` of env 1"):
        buffer.add(**args, action=np.zeros((3, 1)), reward=np.zeros(3), done=np.zeros(3, dtype=bool), infos=[{}] * 3)
    assert buffer.size() == 2
    check_samples(buffer)
