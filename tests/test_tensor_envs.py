"""Envs that hand out tensors: the loop that collects from them, the adapter, and the tasks on MuJoCo Warp."""

import copy
import importlib.util
import sys

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_deepcrl import DeepCRL, evaluate_goals
from sb3_deepcrl.common.callbacks import TrainingDisplay
from sb3_deepcrl.common.tensor_env import DeviceObs
from sb3_deepcrl.envs import BatchVecEnv, plot_maze
from sb3_deepcrl.tensor_envs import GoalAdapter, WarpVecEnv

HAS_WARP = importlib.util.find_spec("mujoco_warp") is not None
needs_warp = pytest.mark.skipif(not HAS_WARP, reason="MuJoCo Warp is not installed")
ON_THE_CPU = pytest.mark.filterwarnings("ignore:WarpVecEnv simulates on the CPU")
MODEL = dict(depth=4, width=8, batch_size=16, learning_starts=60, train_freq=5, gradient_steps=2, seed=0, device="cpu")


class TorchReach:
    """
    Points on a plane, as a batched env of Isaac Lab and its kind has them: it writes into its own tensors, resets by itself
    and keeps the last observations. Episodes of env i take 4 + i steps, or end within a radius of their goals.
    """

    device = "cpu"
    single_action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, num_envs=3, keeps_final=True, broken_at=None, radius=0.0):
        self.num_envs, self.keeps_final, self.broken_at, self.radius = num_envs, keeps_final, broken_at, radius
        self.state = th.zeros(num_envs, 5)
        self.generator, self.n_steps = th.Generator().manual_seed(0), 0

    def _start(self, rows):
        self.state[rows] = th.cat((th.rand(self.num_envs, 4, generator=self.generator), th.zeros(self.num_envs, 1)), 1)[rows]

    def reset(self, seed=None):
        if seed is not None:
            self.generator.manual_seed(seed)
        self._start(th.ones(self.num_envs, dtype=th.bool))
        return {"policy": self.state}, {}

    def step(self, actions):
        self.n_steps += 1
        self.state[:, :2] += 0.3 * actions
        self.state[:, 4] += 1
        if self.n_steps == self.broken_at:
            self.state[1, 0] = th.nan
        truncated = self.state[:, 4] >= 4 + th.arange(self.num_envs)
        terminated = (self.state[:, :2] - self.state[:, 2:4]).norm(dim=1) < self.radius
        extras = {"final_obs": {"policy": self.state.clone()}} if self.keeps_final else {}
        reward = -self.state[:, 4]
        self._start(truncated | terminated)
        return {"policy": self.state}, reward, terminated, truncated, extras

    def close(self):
        pass


def make_env(success_threshold=0.3, **kwargs):
    functions = dict(achieved=lambda obs: obs["policy"][:, :2], desired=lambda obs: obs["policy"][:, 2:4])
    return GoalAdapter(TorchReach(**kwargs), **functions, success_threshold=success_threshold)


class Wrapped(VecEnvWrapper):
    """A wrapper that changes nothing, under which Stable-Baselines3 collects."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


def stored(model):
    buffer = model.replay_buffer
    arrays = {**buffer.observations, **{f"next {key}": value for key, value in buffer.next_observations.items()}}
    names = ("actions", "rewards", "dones", "timeouts", "remaining", "head", "episode_steps")
    return {**arrays, **{name: getattr(buffer, name) for name in names}, "n": [buffer.size(), buffer.pos, buffer.n_used]}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("buffer_size", [3000, 90, 12])
def test_same_transitions_in_both_loops(on_device, buffer_size):
    """Learning included, through several turns of the ring, and with episodes that are longer than it."""
    kwargs = dict(MODEL, buffer_size=buffer_size, replay_buffer_kwargs=dict(on_device=on_device))
    kwargs["normalize_observations"] = buffer_size == 90
    models = []
    for env in (make_env(radius=0.2), Wrapped(make_env(radius=0.2))):
        models.append(DeepCRL("MultiInputPolicy", env, **kwargs))
        for n_steps in (100, 137):
            models[-1].learn(n_steps, reset_num_timesteps=False)
    tensors, arrays = models
    assert isinstance(tensors._last_obs, DeviceObs) and not isinstance(arrays._last_obs, DeviceObs)
    assert_same(stored(tensors), stored(arrays))
    ends = tensors.replay_buffer.dones & ~tensors.replay_buffer.timeouts
    assert ends.any() and (tensors.replay_buffer.dones & ~ends).any()
    assert tensors.num_timesteps == arrays.num_timesteps and tensors._episode_num == arrays._episode_num > 20
    assert tensors._n_updates == arrays._n_updates > 0
    assert list(tensors.ep_success_buffer) == list(arrays.ep_success_buffer)
    for first, second in zip(tensors.ep_info_buffer, arrays.ep_info_buffer, strict=True):
        assert (first["r"], first["l"]) == (second["r"], second["l"])
    for first, second in zip(tensors.policy.parameters(), arrays.policy.parameters(), strict=True):
        assert th.equal(first, second)


@pytest.mark.parametrize("on_device", [False, True])
def test_not_a_number(on_device):
    """Nothing from the broken step on is stored or learned from, and the model goes on."""
    kwargs = dict(MODEL, replay_buffer_kwargs=dict(on_device=on_device), normalize_observations=True)
    models = []
    for env in (make_env(broken_at=33), Wrapped(make_env(broken_at=33))):
        model = DeepCRL("MultiInputPolicy", env, **kwargs)
        with pytest.raises(ValueError, match=r"NaN or infinity in `(observation|achieved_goal)` of env 1.*It was not stored"):
            model.learn(200)
        assert model._last_obs is None
        models.append(model)
    assert_same(stored(models[0]), stored(models[1]))
    for model in models:
        assert model.replay_buffer.size() == 32 and th.isfinite(model.actor.normalizer.mean).all()
        model.learn(60, reset_num_timesteps=False)
        assert all(np.isfinite(values).all() for values in model.replay_buffer.observations.values())


class Interrupt(BaseCallback):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def _on_step(self):
        if self.n_calls == self.at:
            raise KeyboardInterrupt
        return True


def test_interrupted_saved_and_continued(tmp_path):
    """In the middle of a rollout, of which the host knows nothing yet."""
    model = DeepCRL("MultiInputPolicy", make_env(), **MODEL, replay_buffer_kwargs=dict(on_device=True))
    with pytest.raises(KeyboardInterrupt):
        model.learn(200, callback=Interrupt(23))
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer.size() == 22
    other = DeepCRL.load(tmp_path / "model", env=Wrapped(make_env()), device="cpu")
    other.load_replay_buffer(tmp_path / "buffer")
    copied = copy.deepcopy(model.replay_buffer)
    for each in (model, other):
        each.learn(60, reset_num_timesteps=False)
    assert model.replay_buffer.size() == other.replay_buffer.size() > copied.size() == 22
    for name, values in copied.observations.items():
        np.testing.assert_array_equal(values, model.replay_buffer.observations[name][:22])


@pytest.mark.parametrize("call", range(7))
def test_interrupted_while_storing(call, monkeypatch):
    """Episodes that were running are dropped, and all others stay what they are."""
    model = DeepCRL("MultiInputPolicy", make_env(), **MODEL, buffer_size=90, replay_buffer_kwargs=dict(on_device=True))
    model.learn(150)
    isfinite, calls = th.isfinite, iter(range(100))

    def interrupted(tensor):
        if next(calls) == 7 * 3 + call:
            raise KeyboardInterrupt
        return isfinite(tensor)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(th, "isfinite", interrupted)
        model.learn(150, reset_num_timesteps=False)
    model.learn(30, reset_num_timesteps=False)
    buffer = model.replay_buffer
    steps, next_steps = buffer.observations["observation"][..., 4], buffer.next_observations["observation"][..., 4]
    np.testing.assert_array_equal(next_steps, steps + 1)
    assert buffer.size() > 10


def test_callbacks_see_every_step_and_may_stop():
    class Recorder(BaseCallback):
        def _on_step(self):
            assert isinstance(self.locals["new_obs"]["observation"], th.Tensor) and len(self.locals["infos"]) == 3
            rewards, dones = self.locals["rewards"], self.locals["dones"]
            # Rewards are minus the numbers of steps
            assert rewards.mean() == np.mean([*rewards]) and (rewards[dones] <= -4).all() and (-rewards >= 1).sum() == 3
            assert np.maximum(rewards, 0).max() == 0 and dones.any() == any(dones) and bool(dones[:1]) == dones[0]
            # What is stored are the tensors
            with pytest.raises(ValueError, match="read-only"):
                rewards += 1
            with pytest.raises(ValueError, match="read-only"):
                rewards[dones] = 0
            assert not hasattr(dones, "nothing") and copy.copy(rewards).shape == copy.deepcopy(rewards).shape == (3,)
            return self.n_calls < 12

        def _on_rollout_end(self):
            lengths.extend(info["episode"]["l"] for info in self.locals["episode_infos"])

    lengths: list[int] = []
    model = DeepCRL("MultiInputPolicy", make_env(), **MODEL).learn(500, callback=[TrainingDisplay(), Recorder()])
    # The last step is not stored, as in Stable-Baselines3
    assert model.num_timesteps == 36 and model.replay_buffer.size() == 11
    assert lengths[:3] == [4, 5, 6]
    model.learn(300, callback=StopTrainingOnMaxEpisodes(4))
    assert model.num_timesteps < 100


def test_what_stable_baselines3_has_to_collect():
    """Action noise, and wrappers, whatever the last rollout was collected by."""
    model = DeepCRL("MultiInputPolicy", make_env(), **MODEL, replay_buffer_kwargs=dict(on_device=True)).learn(90)
    model.action_noise = NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))
    model.learn(90, reset_num_timesteps=False)
    assert not isinstance(model._last_obs, DeviceObs)
    model.action_noise = None
    model.learn(90, reset_num_timesteps=False)
    assert isinstance(model._last_obs, DeviceObs) and model.replay_buffer.size() == 90
    # No episode was cut by the changes
    ends = model.replay_buffer.dones[:, 2] > 0
    assert (np.diff(np.flatnonzero(ends)) <= 6).all() and model.replay_buffer.timeouts[:, 2].any()
    normalized = DeepCRL("MultiInputPolicy", VecNormalize(make_env(), norm_reward=False), **MODEL).learn(90)
    assert normalized.replay_buffer.size() == 30 and normalized.env.obs_rms["observation"].count > 80


def test_adapter_keeps_the_last_observation():
    env = make_env()
    observation = env.reset_tensors()
    for n in range(1, 12):
        previous, step = observation, env.step_tensors(th.ones(3, 2))
        observation = step.observation
        # The simulator writes into its tensors, but not into those that it gave
        assert th.equal(previous["observation"][:, 4], th.tensor([(n - 1) % 4, (n - 1) % 5, (n - 1) % 6]).float())
        done = step.terminated | step.truncated
        assert th.equal(done, th.tensor([n % 4 == 0, n % 5 == 0, n % 6 == 0]))
        torch_length = step.terminal_observation["observation"][:, 4]
        assert th.equal(torch_length, previous["observation"][:, 4] + 1)
        moved = step.terminal_observation["achieved_goal"] - previous["achieved_goal"]
        th.testing.assert_close(moved, th.full((3, 2), 0.3))
        assert th.equal(step.terminal_observation["desired_goal"], previous["desired_goal"])


def test_adapter_without_a_last_observation():
    """The one before stands in for it, never one of the next episode."""
    env = make_env(keeps_final=False)
    previous = env.reset_tensors()
    for _ in range(4):
        step = env.step_tensors(th.ones(3, 2))
        last, previous = previous, step.observation
    assert step.truncated.tolist() == [True, False, False]
    for key, values in step.terminal_observation.items():
        assert th.equal(values[0], last[key][0]) and th.equal(values[1:], step.observation[key][1:])


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_adapter_of_four_values(shape):
    """As in RSL-RL and MuJoCo Playground: one flag for the end of an episode, and time-outs among the extras."""

    class Playground(TorchReach):
        def reset(self):
            return super().reset()[0]["policy"]

        def step(self, actions):
            observation, reward, terminated, truncated, _ = super().step(actions)
            done = (terminated | truncated).float().reshape(shape)
            return observation["policy"], reward.reshape(shape), done, {"time_outs": truncated.float()}

    env = GoalAdapter(Playground(), lambda obs: obs[:, :2], lambda obs: obs[:, 2:4])
    env.seed(3)
    assert env.reset()["observation"].shape == (3, 5)
    infos = [env.step(np.zeros((3, 2)))[3] for _ in range(4)]
    assert not any(any(info) for info in infos[:3])
    assert infos[3][0]["TimeLimit.truncated"] and "is_success" not in infos[3][0] and not infos[3][1]


class WithoutActionSpace(TorchReach):
    single_action_space = property()


@pytest.mark.parametrize("change, message", [
    (dict(achieved=lambda obs: obs["policy"][0]), r"`achieved_goal` must be a tensor of shape \(3, ...\)"),
    (dict(desired=lambda obs: obs["policy"][:, :3]), "must have one shape"),
    (dict(observation=lambda obs: obs), "`observation` must be a tensor"),
    (dict(env=object()), "has no attribute `device`.*no batched env on tensors"),
    (dict(env=WithoutActionSpace()), "has no attribute `single_action_space`: pass `action_space=`"),
])  # fmt: skip
def test_adapter_refuses(change, message):
    kwargs = dict(env=TorchReach(), achieved=lambda obs: obs["policy"][:, :2], desired=lambda obs: obs["policy"][:, 2:4])
    with pytest.raises(ValueError, match=message):
        GoalAdapter(**{**kwargs, **change})


def test_arrays_of_the_adapter():
    """What another algorithm sees: arrays, and infos only where an episode ended."""
    env, twin = make_env(), make_env()
    assert env.env_is_wrapped(Monitor, [0]) == [True] and env.env_is_wrapped(TimeLimit) == [False] * 3
    env.seed(1), twin.seed(1)
    assert_same(env.reset(), twin.reset_tensors())
    for _ in range(8):
        observation, _, dones, infos = env.step(np.full((3, 2), 0.5, dtype=np.float32))
        step = twin.step_tensors(th.full((3, 2), 0.5))
        assert_same(observation, step.observation)
        assert all(bool(info) == done for info, done in zip(infos, dones, strict=True))
        for i in np.flatnonzero(dones):
            assert_same(infos[i]["terminal_observation"], {k: v[i] for k, v in step.terminal_observation.items()})
            assert infos[i]["episode"]["l"] == 4 + i and infos[i]["episode"]["r"] == -sum(range(1, 5 + i))
            assert infos[i]["is_success"] == step.measures["is_success"][i] and infos[i]["TimeLimit.truncated"]
    model = SAC("MultiInputPolicy", env, learning_starts=20, batch_size=8, device="cpu").learn(60)
    assert len(model.ep_info_buffer) > 5 and model._n_updates > 0


@pytest.mark.parametrize("success_threshold, fraction", [(1e-9, 0.0), (100.0, 1.0)])
def test_evaluation_counts_steps_at_the_goal(success_threshold, fraction):
    env = make_env(success_threshold)
    model = DeepCRL("MultiInputPolicy", env, **MODEL)
    episodes = evaluate_goals(model, env, 6)
    assert sorted(episode.episode_length for episode in episodes) == [4, 4, 5, 5, 6, 6]
    assert all(episode.time_at_goal_fraction == fraction and episode.success_any == fraction for episode in episodes)
    assert all(0 < episode.mean_distance < 10 for episode in episodes)


def test_display_shows_what_the_episodes_tell():
    """Of the loop on tensors, and of Stable-Baselines3's."""
    for env in (make_env(100.0), Wrapped(make_env(100.0))):
        display = TrainingDisplay()
        DeepCRL("MultiInputPolicy", env, **MODEL).learn(60, callback=display)
        assert list(display.times_at_goal) == [1.0] * 12 and list(display.successes) == [True] * 12


# --- MuJoCo Warp ------------------------------------------------------------------------------------------------------

# Largest differences after one step in float32: half of the numbers, 99 of 100, and all of them. Where a contact begins,
# Warp's solver stops elsewhere
TOLERANCES = {
    "PointU4Maze-v0": (1e-6, 1e-4, 1e-3),
    "AntU4Maze-v0": (1e-6, 1e-4, 1e-3),
    "HumanoidUMaze-v0": (1e-5, 1e-1, 1.0),
    "ArmBinpickHard-v0": (1e-6, 1e-2, 5.0),
}


def start_from(vec_env, warp_env):
    """Let BatchVecEnv go on from the states of WarpVecEnv."""
    for name in ("qpos", "qvel"):
        vec_env.simulation.batch.bind(name)[:] = warp_env.state[name].numpy()


@needs_warp
@ON_THE_CPU
@pytest.mark.parametrize("env_id", [
    "PointU4Maze-v0",
    *[pytest.param(env_id, marks=pytest.mark.slow) for env_id in TOLERANCES if not env_id.startswith("Point")],
])  # fmt: skip
def test_warp_does_what_the_batch_does(env_id):
    """One step at a time, 100 times, with resets: episodes are short, and the ant and the humanoid fall."""
    kwargs = dict(n_envs=4, max_episode_steps=30, goal="resample")
    envs = warp_env, batch_env = [make(env_id, **kwargs) for make in (WarpVecEnv, BatchVecEnv)]
    first, second = (env.reset() for env in envs if env.seed(3))
    assert_same(first, second)
    rng, errors, n_ended = np.random.default_rng(0), [], 0
    for _ in range(100):
        start_from(batch_env, warp_env)
        actions = rng.uniform(-1, 1, (4, *warp_env.action_space.shape)).astype(np.float32)
        (obs, rewards, dones, infos), expected = (env.step(actions) for env in envs)
        np.testing.assert_array_equal(rewards, expected[1])
        np.testing.assert_array_equal(dones, expected[2])
        assert obs.keys() == expected[0].keys()
        for i in range(4):
            if not dones[i]:
                assert infos[i] == {}
                errors.append(np.abs(obs["observation"][i] - expected[0]["observation"][i]))
                continue
            n_ended += 1
            assert warp_env.reset_infos[i] == batch_env.reset_infos[i]
            info = expected[3][i]
            # The next start and goal are the same numbers
            for key in obs:
                np.testing.assert_array_equal(obs[key][i], expected[0][key][i])
            last, expected_last = (each["terminal_observation"]["observation"] for each in (infos[i], info))
            errors.append(np.abs(last - expected_last))
            assert infos[i]["episode"]["l"] == info["episode"]["l"]
            for name in info.keys() - {"episode", "terminal_observation", "distance"}:
                assert infos[i][name] == info[name], name
    assert n_ended >= 12
    median, most, worst = TOLERANCES[env_id]
    assert np.median(errors) < median and np.quantile(errors, 0.99) < most and np.max(errors) < worst


@pytest.fixture(scope="module")
def points():
    """A few points in the smallest maze, whose kernels are compiled once."""
    if not HAS_WARP:
        pytest.skip("MuJoCo Warp is not installed")
    with pytest.warns(UserWarning, match="BatchVecEnv is the faster one"):
        return make_vec_env("PointUMaze-v0", 8, vec_env_cls=WarpVecEnv, env_kwargs=dict(max_episode_steps=20))


def test_warp_trains_deepcrl_on_tensors(points):
    model = DeepCRL("MultiInputPolicy", points, **MODEL, replay_buffer_kwargs=dict(on_device=True)).learn(600)
    assert isinstance(model._last_obs, DeviceObs) and model._n_updates > 10
    assert [info["l"] for info in model.ep_info_buffer] == [20] * 24 and model.replay_buffer.size() == 75
    assert model.replay_buffer.timeouts.sum() == 24 and set(model.ep_success_buffer) <= {True, False}
    # All states are within the maze, each next to the one before it
    moved = model.replay_buffer.next_observations["achieved_goal"] - model.replay_buffer.observations["achieved_goal"]
    assert 0.01 < np.abs(moved).max() < 0.5


@needs_warp
@pytest.mark.gpu
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_warp_on_a_gpu():
    env = WarpVecEnv("PointUMaze-v0", 64, max_episode_steps=20)
    assert env.device.type == "cuda"
    model = DeepCRL("MultiInputPolicy", env, **{**MODEL, "device": "cuda"}, replay_buffer_kwargs=dict(on_device=True))
    model.learn(64 * 30)
    assert model._n_updates > 0 and env.n_diverged == 0
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_warp_trains_sac_on_arrays(points):
    model = SAC("MultiInputPolicy", points, learning_starts=50, batch_size=8, device="cpu").learn(300)
    assert model._n_updates > 20 and model.ep_info_buffer[0]["l"] == 20


def test_warp_starts_and_goals_follow_the_same_law(points):
    """Where goals follow each other, by their frequencies; else they are the same ones, see above."""
    batch = BatchVecEnv("PointUMaze-v0", 8, max_episode_steps=20)
    points.set_attr("success_threshold", 100.0), batch.set_attr("success_threshold", 100.0)
    chosen = []
    for env in (points, batch):
        env.seed(5)
        goals = [env.reset()["desired_goal"]]
        for _ in range(200):
            goals.append(env.step(np.zeros((8, 2)))[0]["desired_goal"])
        chosen.append(np.array(goals))
    points.set_attr("success_threshold", 0.5)
    # Each step reaches its goal and asks for another one
    cells, counts = zip(*(np.unique(goals.reshape(-1, 2), axis=0, return_counts=True) for goals in chosen), strict=True)
    np.testing.assert_array_equal(*cells)
    assert (np.abs(counts[0] - counts[1]) < 6 * np.sqrt(counts[1])).all()
    following = [np.abs(np.diff(goals, axis=0)).sum(axis=2) > 0 for goals in chosen]
    assert all(moved[:19].all() for moved in following)


def test_warp_is_seen_and_set_like_the_batch(points):
    points.seed(0)
    start = points.reset()
    points.set_options({"start": [2.0, 2.0], "goal": [2.0, 6.0]})
    assert (points.reset()["desired_goal"] == [2, 6]).all()
    points.env_method("set_wrapper_attr", "goal", [6.0, 2.0], indices=3)
    observation = points.step(np.zeros((8, 2), dtype=np.float32))[0]
    assert observation["desired_goal"][[2, 3]].tolist() == [[2, 6], [6, 2]]
    # Resets that are drawn ahead do not change it
    for n in range(2, 38):
        if n == 25:
            points.env_method("set_wrapper_attr", "goal", [6.0, 2.0], indices=3)
        observation = points.step(np.zeros((8, 2), dtype=np.float32))[0]
    assert observation["desired_goal"][3].tolist() == [6, 2]
    assert points.get_attr("goal", 3)[0].tolist() == [6, 2] and points.get_attr("_max_episode_steps", 0) == [20]
    drawn = next(each for each in plot_maze(points).collections if each.get_label() == "goal").get_offsets()
    np.testing.assert_array_equal(drawn[:, ::-1], observation["desired_goal"])
    # From the next episode on
    points.set_attr("goal_mode", "fixed")
    for _ in range(20):
        first = points.step(np.zeros((8, 2), dtype=np.float32))[0]
    for _ in range(20):
        second = points.step(np.zeros((8, 2), dtype=np.float32))[0]
    points.set_attr("goal_mode", "continuing")
    np.testing.assert_array_equal(first["desired_goal"], second["desired_goal"])
    with pytest.raises(TypeError, match="can neither be copied nor pickled"):
        copy.deepcopy(points)
    with pytest.raises(ValueError, match="is not finite"):
        points.step(np.full((8, 2), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match=r"shape \(8, 3\), expected \(8, 2\)"):
        points.step_tensors(th.zeros(8, 3))
    assert points.n_diverged == 0 and start.keys() == observation.keys()


@ON_THE_CPU
def test_warp_truncates_what_diverged():
    if not HAS_WARP:
        pytest.skip("MuJoCo Warp is not installed")
    env = WarpVecEnv("PointUMaze-v0", 3)
    with pytest.raises(RuntimeError, match=r"Call reset\(\)"):
        env.step_tensors(th.zeros(3, 2))
    before = env.reset_tensors()
    env.state["qvel"][1] = th.nan
    step = env.step_tensors(th.zeros(3, 2))
    assert step.truncated.tolist() == step.measures["diverged"].tolist() == [False, True, False]
    assert th.equal(step.terminal_observation["observation"][1], before["observation"][1])
    assert th.isfinite(step.observation["observation"]).all() and env.n_diverged == 1
    assert not env.step_tensors(th.zeros(3, 2)).measures["diverged"].any()
    env.close()
    with pytest.raises(RuntimeError, match="is closed"):
        env.step_tensors(th.zeros(3, 2))


def test_warp_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3_deepcrl\[warp\]'"):
        WarpVecEnv("PointUMaze-v0", 2)


def test_measures_keep_their_kind():
    """Booleans are booleans in the infos, and `success` is counted where there is no `is_success`."""
    env = make_env(success_threshold=10.0)
    step_tensors = env.step_tensors

    def with_success_only(actions):
        step = step_tensors(actions)
        return step._replace(measures={"success": step.measures["is_success"], "distance": step.measures["distance"]})

    env.step_tensors = with_success_only
    env.reset()
    for _ in range(4):
        infos = env.step(np.zeros((3, 2)))[3]
    assert infos[0]["success"] is True and infos[0]["time_at_goal"] == 4 and type(infos[0]["distance"]) is float


def test_adapter_refuses_reset_options():
    env = make_env()
    env.set_options({"start": [0.0, 0.0]})
    with pytest.raises(ValueError, match="are not handed to"):
        env.reset()
