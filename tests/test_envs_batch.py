import copy
import csv
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from mujoco.batch import SimulationError
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.envs import BatchVecEnv, GoalEnv, SuccessInfoWrapper, register_envs

register_envs()

# With short episodes, so that resets are part of the comparison; the humanoid falls before that
COMPARED = [
    ("PointUMaze-v0", {}),
    # Most goals are reached, some of them in the last step of an episode
    ("PointUMaze-v0", {"success_threshold": 1.9}),
    ("AntU4Maze-v0", {}),
    ("AntBigMazeEval-v0", {"goal": "fixed", "reward_type": "dense"}),
    ("HumanoidUMaze-v0", {}),
    ("HumanoidGoal-v0", {"reset_noise_scale": 0.01}),
    ("ArmBinpickHard-v0", {}),
    ("AntUMazeStitch-v0", {"terminate_when_unhealthy": False}),
]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
        assert first[key].dtype == second[key].dtype == np.float32


def random_actions(env, n):
    return np.random.default_rng(1).uniform(-1.2, 1.2, (n, env.num_envs, *env.action_space.shape)).astype(np.float32)


@pytest.mark.parametrize("env_id", ["AntUMaze-v0", "HumanoidGoal-v0"])
def test_copy_goes_on_where_it_is(env_id, tmp_path):
    make = partial(make_vec_env, env_id, n_envs=3, vec_env_cls=BatchVecEnv, seed=1)
    env = make(monitor_dir=str(tmp_path), env_kwargs={"max_episode_steps": 7})
    env.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 3, *env.action_space.shape))
    for action in actions[:10]:
        env.step(action)
    copies = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    for action in actions[10:]:
        expected, *found = (vec_env.step(action) for vec_env in (env, *copies))
        for observation, rewards, dones, _ in found:
            assert all(np.array_equal(observation[key], expected[0][key]) for key in observation)
            assert np.array_equal(rewards, expected[1]) and np.array_equal(dones, expected[2])
    env.close()
    copies[0].step(action)


@pytest.mark.parametrize("make_env", [lambda: BatchVecEnv("PointUMaze-v0", 2), lambda: gym.make("PointUMaze-v0")])
def test_copied_model_goes_on(make_env):
    model = DeepCRL("MultiInputPolicy", make_env(), depth=4, width=16, batch_size=16, learning_starts=20).learn(40)
    copied = copy.deepcopy(model).learn(40, reset_num_timesteps=False)
    assert copied.num_timesteps == 80 and model.num_timesteps == 40
    model.learn(40, reset_num_timesteps=False)


@pytest.mark.parametrize("env_id, kwargs", COMPARED)
def test_same_trajectories_for_any_number_of_threads_and_as_single_envs(env_id, kwargs):
    n, limit = 5, 25
    vec_envs = [BatchVecEnv(env_id, n, n_threads=threads, max_episode_steps=limit, **kwargs) for threads in (1, 2, 3)]
    singles = [gym.make(env_id, max_episode_steps=limit, **kwargs) for _ in range(n)]
    observations = []
    for vec_env in vec_envs:
        assert list(vec_env.seed(11)) == [11, 12, 13, 14, 15]
        observations.append(vec_env.reset())
    single = [env.reset(seed=11 + i) for i, env in enumerate(singles)]
    finished = 0
    for actions in random_actions(vec_envs[0], 60):
        for other in observations[1:]:
            assert_same(observations[0], other)
        assert_same(observations[0], {key: np.stack([obs[key] for obs, _ in single]) for key in observations[0]})
        steps = [vec_env.step(actions) for vec_env in vec_envs]
        observations = [step[0] for step in steps]
        _, rewards, dones, infos = steps[0]
        for step in steps[1:]:
            np.testing.assert_array_equal(rewards, step[1])
            np.testing.assert_array_equal(dones, step[2])
        for i, env in enumerate(singles):
            obs, reward, terminated, truncated, info = env.step(np.clip(actions[i], -1, 1))
            assert (reward, terminated or truncated) == (rewards[i], dones[i])
            assert infos[i]["TimeLimit.truncated"] == (truncated and not terminated)
            assert info == {key: infos[i][key] for key in info}
            if dones[i]:
                finished += 1
                assert_same(obs, infos[i]["terminal_observation"])
                obs, info = env.reset()
                assert info == vec_envs[0].reset_infos[i]
            else:
                assert infos[i].keys() - info.keys() == {"TimeLimit.truncated"}
            single[i] = (obs, info)
    assert finished >= n


def test_environments_differ_and_seeds_repeat():
    vec_env = BatchVecEnv("AntU4Maze-v0", 4, 2)
    vec_env.seed(0)
    first = vec_env.reset()
    assert len(np.unique(first["observation"], axis=0)) == 4
    # A seed is used once, the random numbers then go on
    assert (vec_env.reset()["observation"] != first["observation"]).any()
    vec_env.seed(0)
    assert_same(first, vec_env.reset())
    # Without a seed, no two vectorized environments are alike
    assert (
        BatchVecEnv("AntU4Maze-v0", 4).reset()["observation"] != BatchVecEnv("AntU4Maze-v0", 4).reset()["observation"]
    ).any()


def test_episode_statistics_and_truncation():
    vec_env = BatchVecEnv("PointUMaze-v0", 3, max_episode_steps=10, reward_type="dense")
    vec_env.reset()
    total = np.zeros(3)
    for step in range(1, 21):
        _, rewards, dones, infos = vec_env.step(np.zeros((3, 2), dtype=np.float32))
        total += rewards
        assert dones.all() == dones.any() == (step % 10 == 0)
        for i, info in enumerate(infos):
            assert info["TimeLimit.truncated"] == dones[i]
            assert ("episode" in info) == ("terminal_observation" in info) == dones[i]
            if dones[i]:
                assert info["episode"]["l"] == 10
                assert info["episode"]["r"] == pytest.approx(total[i], abs=1e-5)
                assert info["episode"]["t"] >= 0
                total[i] = 0


def test_fall_is_no_truncation():
    vec_env = BatchVecEnv("HumanoidUMaze-v0", 2)
    vec_env.reset()
    dones = [False]
    while not any(dones):
        _, _, dones, infos = vec_env.step(np.zeros((2, 17), dtype=np.float32))
    assert not infos[0]["TimeLimit.truncated"] and not infos[0]["is_healthy"]
    assert infos[0]["terminal_observation"]["observation"][2] < 1


def test_nothing_returned_is_changed_later():
    """Off-policy algorithms keep the last observation and infos while they step, and may change them."""
    vec_env, twin = BatchVecEnv("HumanoidUMaze-v0", 3), BatchVecEnv("HumanoidUMaze-v0", 3)
    for env in (vec_env, twin):
        env.seed(0)
    kept, expected = [vec_env.reset()], [twin.reset()]
    for actions in random_actions(vec_env, 90):
        for arrays, env in ((kept, vec_env), (expected, twin)):
            observation, _, _, infos = env.step(actions)
            terminal = [info["terminal_observation"] for info in infos if "terminal_observation" in info]
            arrays += [observation, *terminal]
        # The untouched twin tells what a change breaks: of what is kept, of the simulation, or of what is returned next
        for observation in kept[-1 - len(terminal) :]:
            for value in observation.values():
                value += 1.0
    assert len(kept) == len(expected) > 91
    assert_same(kept[0], expected[0])
    for changed, original in zip(kept[1:], expected[1:], strict=True):
        assert_same(changed, {key: value + np.float32(1) for key, value in original.items()})


def test_options_for_one_reset():
    vec_env = BatchVecEnv("AntU4Maze-v0", 2)
    vec_env.set_options([{"goal": [4.0, 4.0]}, {"start": [4.0, 4.0], "goal": [20.0, 4.0]}])
    observation = vec_env.reset()
    np.testing.assert_array_equal(observation["desired_goal"], [[4, 4], [20, 4]])
    np.testing.assert_array_equal(observation["achieved_goal"][1], [4, 4])
    assert (vec_env.reset()["achieved_goal"][1] != [4, 4]).any()
    vec_env.set_options([{}, {"goal": [0.0, 0.0]}])
    with pytest.raises(ValueError, match=r"Env 1: The goal \[0.0, 0.0\] lies in the wall at row 0, column 0"):
        vec_env.reset()
    vec_env.set_options([{}, {"goal": [0.0]}])
    with pytest.raises(ValueError, match=r"Env 1: .* must be 2 finite numbers"):
        vec_env.reset()


# --- Attributes and methods of the environments -----------------------------------------------------------------------


def test_env_method_and_attributes():
    vec_env = BatchVecEnv("AntU4Maze-v0", 3, reward_type="sparse")
    observation = vec_env.reset()
    (rewards,) = vec_env.env_method(
        "compute_reward", observation["achieved_goal"], observation["achieved_goal"], [{}] * 3, indices=[0]
    )
    np.testing.assert_array_equal(rewards, np.ones(3))
    assert [spec.id for spec in vec_env.get_attr("spec")] == ["AntU4Maze-v0"] * 3
    assert vec_env.get_attr("render_mode") == [None] * 3
    assert vec_env.get_attr("unwrapped")[0].task is vec_env.task
    assert not vec_env.has_attr("no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        vec_env.get_attr("no_such_thing")
    np.testing.assert_array_equal(vec_env.get_attr("goal"), observation["desired_goal"])

    vec_env.set_attr("goal", [4.0, 4.0], indices=[1])
    assert vec_env.get_attr("goal", indices=[1])[0].tolist() == [4, 4]
    goals = vec_env.step(np.zeros((3, 8)))[0]["desired_goal"]
    np.testing.assert_array_equal(goals, [observation["desired_goal"][0], [4, 4], observation["desired_goal"][2]])
    with pytest.raises(ValueError, match=r"goal .* lies in the wall"):
        vec_env.set_attr("goal", [0.0, 0.0], indices=0)

    with pytest.raises(ValueError, match="must be 2 finite numbers"):
        vec_env.set_attr("goal", None)
    vec_env.set_attr("reward_type", "dense")
    assert (vec_env.step(np.zeros((3, 8)))[1] < 0).all()
    with pytest.raises(ValueError, match="All environments share 'reward_type'"):
        vec_env.set_attr("reward_type", "sparse", indices=[0])


def test_settable_attributes():
    vec_env = BatchVecEnv("PointUMaze-v0", 2)
    vec_env.set_attr("max_episode_steps", 3)
    assert vec_env.get_attr("max_episode_steps") == vec_env.get_attr("_max_episode_steps") == [3, 3]
    vec_env.reset()
    dones = [vec_env.step(np.zeros((2, 2)))[2].tolist() for _ in range(3)]
    assert dones == [[False, False], [False, False], [True, True]]
    for name, value, message in (
        ("max_episode_steps", 0, "max_episode_steps=0"),
        ("success_threshold", -3, "success_threshold=-3"),
        ("success_threshold", None, "success_threshold=None"),
        ("reward_type", "shaped", "Unknown reward_type"),
        ("goal_mode", "moving", "Unknown goal_mode"),
    ):
        with pytest.raises(ValueError, match=message):
            vec_env.set_attr(name, value)
    for name in ("frame_skip", "render_mode", "compute_reward", "note"):
        with pytest.raises(AttributeError, match=r"EnvView"):
            vec_env.set_attr(name, None)
    with pytest.raises(ValueError, match="All environments share 'max_episode_steps'"):
        vec_env.set_attr("max_episode_steps", 5, indices=1)


@pytest.mark.parametrize("face", [DummyVecEnv, BatchVecEnv])
def test_both_faces_have_the_same_attributes(face):
    vec_env = make_vec_env("PointUMazeEval-v0", 2, vec_env_cls=face)
    vec_env.reset()
    assert vec_env.get_attr("reward_type") == ["sparse"] * 2 and vec_env.has_attr("success_threshold")
    assert vec_env.env_method("get_wrapper_attr", "reward_type") == ["sparse"] * 2
    assert [vec_env.env_method("has_wrapper_attr", name)[0] for name in ("goal", "nothing")] == [True, False]
    for name in ("action_space", "observation_space"):
        assert vec_env.get_attr(name) == [getattr(vec_env, name)] * 2
    assert all(isinstance(generator, np.random.Generator) for generator in vec_env.get_attr("np_random"))
    for name, value in (("reward_type", "dense"), ("success_threshold", 9.0), ("goal_mode", "fixed"), ("goal", [6.0, 2.0])):
        assert vec_env.env_method("set_wrapper_attr", name, value) == [True] * 2
    assert vec_env.env_method("set_wrapper_attr", "_max_episode_steps", 1) == [True] * 2
    _, rewards, dones, infos = vec_env.step(np.zeros((2, 2), dtype=np.float32))
    assert (rewards < -3).all() and dones.all()
    for info in infos:
        assert info["is_success"] and info["terminal_observation"]["desired_goal"].tolist() == [6, 2]
    with pytest.raises(ValueError, match="success_threshold=-3"):
        vec_env.env_method("set_wrapper_attr", "success_threshold", -3)


def test_wrappers_it_stands_in_for():
    vec_env = BatchVecEnv("AntU4Maze-v0", 2)
    assert vec_env.env_is_wrapped(Monitor) == [True, True]
    assert vec_env.env_is_wrapped(TimeLimit, indices=[0]) == [True]
    assert vec_env.env_is_wrapped(SuccessInfoWrapper) == [False, False]
    assert BatchVecEnv([lambda: GoalEnv(robot="point", maze="u")]).env_is_wrapped(TimeLimit) == [False]
    # evaluate_policy warns about environments without Monitor
    # A robot that cannot fall
    short = BatchVecEnv("PointU4Maze-v0", 2, max_episode_steps=5)
    model = SAC("MultiInputPolicy", short, buffer_size=10, policy_kwargs={"net_arch": [4]}, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, lengths = evaluate_policy(model, short, 4, return_episode_rewards=True)
    assert lengths == [5] * 4


def test_vec_normalize():
    inner = BatchVecEnv("AntU4Maze-v0", 2, max_episode_steps=4)
    vec_env = VecNormalize(inner, norm_obs_keys=["observation"])
    vec_env.reset()
    for _ in range(4):
        observation, _, dones, infos = vec_env.step(np.zeros((2, 8), dtype=np.float32))
    assert dones.all() and infos[0]["episode"]["l"] == 4
    np.testing.assert_array_equal(observation["desired_goal"], inner.simulation.goals)
    assert vec_env.get_attr("goal_mode") == ["resample"] * 2


# --- make_vec_env -----------------------------------------------------------------------------------------------------


def test_make_vec_env():
    made = make_vec_env(
        "AntU4Maze-v0",
        n_envs=3,
        seed=4,
        env_kwargs={"max_episode_steps": 6},
        vec_env_cls=BatchVecEnv,
        vec_env_kwargs={"n_threads": 2},
    )
    plain = make_vec_env("AntU4Maze-v0", n_envs=3, seed=4, env_kwargs={"max_episode_steps": 6})
    assert isinstance(made, BatchVecEnv) and made.max_episode_steps == 6 and made.simulation.batch.nthread == 2
    assert made.render_mode == plain.render_mode == "rgb_array"
    first, second = made.reset(), plain.reset()
    for actions in random_actions(made, 14):
        assert_same(first, second)
        first, rewards, dones, infos = made.step(actions)
        second, other_rewards, other_dones, other_infos = plain.step(np.clip(actions, -1, 1))
        np.testing.assert_array_equal(rewards, other_rewards)
        np.testing.assert_array_equal(dones, other_dones)
        for info, other in zip(infos, other_infos, strict=True):
            assert info.keys() == other.keys()
            assert info.get("episode", {}).get("l") == other.get("episode", {}).get("l")


def test_make_vec_env_writes_monitor_files(tmp_path):
    vec_env = make_vec_env(
        "PointUMaze-v0",
        n_envs=2,
        monitor_dir=str(tmp_path),
        monitor_kwargs={"info_keywords": ("is_success",)},
        env_kwargs={"max_episode_steps": 5},
        vec_env_cls=BatchVecEnv,
    )
    vec_env.reset()
    for _ in range(10):
        vec_env.step(np.zeros((2, 2), dtype=np.float32))
    vec_env.close()
    for i in range(2):
        lines = (tmp_path / f"{i}.monitor.csv").read_text().splitlines()
        assert '"env_id": "PointUMaze-v0"' in lines[0]
        assert [(row["l"], row["is_success"]) for row in csv.DictReader(lines[1:])] == [("5", "False")] * 2


def test_id_with_a_module():
    assert BatchVecEnv("sb3_deepcrl:PointUMaze-v0", 2).spec.id == "PointUMaze-v0"
    with pytest.raises(ValueError, match="'gymnasium_robotics:FetchReach-v4' is no environment of this package"):
        BatchVecEnv("gymnasium_robotics:FetchReach-v4")


def test_spec_makes_the_same_env():
    vec_env = BatchVecEnv("AntUMaze-v0", 2, max_episode_steps=50, camera="top_down", reward_type="dense")
    env = gym.make(vec_env.get_attr("spec")[0])
    assert env.get_wrapper_attr("_max_episode_steps") == 50 and env.unwrapped.picture["camera"] == "top_down"
    assert env.unwrapped.task_kwargs == {"robot": "ant", "maze": "u", "reward_type": "dense"}
    assert gym.spec("AntUMaze-v0").kwargs == {"robot": "ant", "maze": "u"}
    assert BatchVecEnv("AntUMaze-v0", max_episode_steps=-1).max_episode_steps is None


def test_list_of_functions_must_be_alike():
    def make(env_id, **kwargs):
        return lambda: gym.make(env_id, **kwargs)

    with pytest.raises(ValueError, match="Env 1 differs from env 0"):
        BatchVecEnv([make("AntU4Maze-v0"), make("AntU5Maze-v0")])
    with pytest.raises(ValueError, match="Env 1 differs from env 0"):
        BatchVecEnv([make("AntU4Maze-v0"), make("AntU4Maze-v0", max_episode_steps=3)])
    with pytest.raises(ValueError, match="Env 0 is a PendulumEnv"):
        BatchVecEnv([make("Pendulum-v1")])
    # The wrapper is not the cause
    with pytest.raises(ValueError, match="Env 0 is a PendulumEnv"):
        BatchVecEnv([lambda: SuccessInfoWrapper(gym.make("Pendulum-v1"))])
    with pytest.raises(ValueError, match="wrapped in SuccessInfoWrapper"):
        BatchVecEnv([lambda: SuccessInfoWrapper(gym.make("AntU4Maze-v0"))])
    with pytest.raises(ValueError, match="list of env functions is empty"):
        BatchVecEnv([])
    with pytest.raises(ValueError, match="cannot be changed on envs that functions return"):
        BatchVecEnv([make("AntU4Maze-v0")], goal="fixed")
    with pytest.raises(ValueError, match=r"\['camera', 'render_mode'\] cannot be changed"):
        BatchVecEnv([make("AntU4Maze-v0")], render_mode="rgb_array", camera="top_down")
    with pytest.raises(ValueError, match="n_envs=2, but 1 functions"):
        BatchVecEnv([make("AntU4Maze-v0")], n_envs=2)


def test_what_functions_do_to_their_envs_is_kept():
    def make(seed):
        env = gym.make("PointUMaze-v0")
        env.unwrapped.reward_type, env.unwrapped.success_threshold, env.unwrapped.goal_mode = "dense", 0.7, "fixed"
        env.reset(seed=seed)
        return env

    batch, plain = (face([partial(make, 3), partial(make, 4)]) for face in (BatchVecEnv, DummyVecEnv))
    assert (batch.task.reward_type, batch.task.success_threshold, batch.task.goal_mode) == ("dense", 0.7, "fixed")
    batch.task.set("goal_mode", "resample"), plain.env_method("set_wrapper_attr", "goal_mode", "resample")
    assert_same(batch.reset(), plain.reset())
    with pytest.raises(ValueError, match="Env 1 differs from env 0"):
        BatchVecEnv([partial(make, 0), lambda: gym.make("PointUMaze-v0")])


def test_subproc_vec_env():
    workers = SubprocVecEnv([lambda: GoalEnv(robot="point", maze="u", random_start=True) for _ in range(2)])
    batch = BatchVecEnv("PointUMaze-v0", 2)
    workers.seed(3)
    batch.seed(3)
    assert_same(dict(workers.reset()), batch.reset())
    actions = np.ones((2, 2), dtype=np.float32)
    assert_same(dict(workers.step(actions)[0]), batch.step(actions)[0])
    workers.close()


# --- Diverging simulations --------------------------------------------------------------------------------------------


def test_divergence_stays_in_its_own_env(tmp_path, monkeypatch):
    # MuJoCo writes its warning into a file in the working directory
    monkeypatch.chdir(tmp_path)
    broken, sound = (BatchVecEnv("AntU4Maze-v0", 4, 2) for _ in range(2))
    for vec_env in (broken, sound):
        vec_env.seed(0)
        before = vec_env.reset()
    broken.simulation.batch.bind("qvel")[2] = 1e12
    actions = np.zeros((4, 8), dtype=np.float32)
    with pytest.warns(UserWarning, match=r"physics of env \[2\] diverged"):
        observation, _, dones, infos = broken.step(actions)
    expected, _, _, _ = sound.step(actions)
    assert dones.tolist() == [False, False, True, False]
    assert infos[2]["diverged"] and infos[2]["TimeLimit.truncated"] and infos[2]["episode"]["l"] == 1
    assert not any("diverged" in infos[i] for i in (0, 1, 3))
    assert_same(infos[2]["terminal_observation"], {key: value[2] for key, value in before.items()})
    assert broken.n_diverged == 1
    others = [0, 1, 3]
    with warnings.catch_warnings():
        # Said once
        warnings.simplefilter("error")
        for _ in range(5):
            assert_same({k: v[others] for k, v in observation.items()}, {k: v[others] for k, v in expected.items()})
            assert all(np.isfinite(value).all() for value in observation.values())
            observation, _, dones, _ = broken.step(actions)
            expected, _, _, _ = sound.step(actions)
            assert not dones.any()
        broken.simulation.batch.bind("qpos")[0] = np.nan
        assert broken.step(actions)[2].tolist() == [True, False, False, False]
    assert broken.n_diverged == 2


def test_an_error_of_the_engine_is_a_divergence(monkeypatch):
    vec_env = BatchVecEnv("AntU4Maze-v0", 3)
    before = vec_env.reset()
    step = vec_env.simulation.batch.step

    def failing_step(**kwargs):
        step(**kwargs)
        raise SimulationError(np.array([1]), "stack overflow")

    monkeypatch.setattr(vec_env.simulation.batch, "step", failing_step)
    with pytest.warns(UserWarning, match=r"env \[1\] diverged"):
        _, _, dones, infos = vec_env.step(np.zeros((3, 8), dtype=np.float32))
    assert dones.tolist() == [False, True, False]
    assert_same(infos[1]["terminal_observation"], {key: value[1] for key, value in before.items()})


def test_single_env_reports_divergence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = gym.make("AntU4Maze-v0")
    before, _ = env.reset(seed=0)
    env.unwrapped.simulation.batch.bind("qvel")[:] = np.nan
    with pytest.warns(UserWarning, match="diverged"):
        observation, _, terminated, truncated, info = env.step(np.zeros(8, dtype=np.float32))
    assert truncated and not terminated and info["diverged"]
    assert_same(observation, before)
    assert "diverged" not in env.reset()[1]
    assert not env.step(np.zeros(8, dtype=np.float32))[3]


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", [DummyVecEnv, BatchVecEnv])
def test_sac_her_and_deepcrl_train(face):
    def make():
        return make_vec_env("PointUMaze-v0", n_envs=4, seed=0, env_kwargs={"max_episode_steps": 15}, vec_env_cls=face)

    settings = {"learning_starts": 100, "batch_size": 32, "buffer_size": 1000, "seed": 0, "device": "cpu"}
    sac = SAC(
        "MultiInputPolicy", make(), replay_buffer_class=HerReplayBuffer, policy_kwargs={"net_arch": [16]}, **settings
    ).learn(240)
    assert sac._n_updates > 20
    model = DeepCRL("MultiInputPolicy", make(), depth=4, width=16, **settings).learn(240)
    assert model.num_timesteps == 240
    assert len(model.ep_success_buffer) == len(model.ep_info_buffer) == 16
    rewards, lengths = evaluate_policy(model, make(), n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [15] * 4 and min(rewards) >= 0


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"n_envs": 0}, "n_envs=0"),
        ({"n_envs": True}, "n_envs=True"),
        ({"n_envs": 2, "n_threads": 0}, "n_threads=0"),
        ({"n_threads": -1}, "n_threads=-1"),
        ({"max_episode_steps": 0}, "max_episode_steps=0"),
        ({"render_mode": "human"}, "render_mode='human'"),
        ({"goal": "moving"}, "Unknown goal 'moving'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BatchVecEnv("AntU4Maze-v0", **kwargs)


def test_what_no_batch_is_made_from():
    env = GoalEnv(robot="point", maze="u")
    for wrong in (env, lambda: env, [env], 3):
        with pytest.raises(ValueError, match=r"BatchVecEnv cannot be made from .*: pass the id"):
            BatchVecEnv(wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_thread'"):
        BatchVecEnv("PointUMaze-v0", n_thread=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        make_vec_env("PointUMaze-v0", 2, env_kwargs={"foo": 1}, vec_env_cls=BatchVecEnv)


def test_closed():
    vec_env = BatchVecEnv("PointUMaze-v0", 2, render_mode="rgb_array")
    vec_env.reset()
    vec_env.step_async(np.zeros((2, 2)))
    vec_env.close()
    vec_env.close()
    calls = (
        vec_env.reset,
        vec_env.step_wait,
        vec_env.get_images,
        lambda: vec_env.step(np.zeros((2, 2))),
        lambda: vec_env.env_method("render"),
        lambda: vec_env.set_attr("goal", [2.0, 2.0]),
        lambda: vec_env.simulation.batch,
        lambda: vec_env.simulation.data(0),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="The environment is closed"):
            call()


def number_of_threads() -> int:
    return int(re.search(r"Threads:\s*(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture
def no_cycle_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the number of threads is unknown")
@pytest.mark.parametrize("end", ["close", "del", "close the wrapper"])
def test_threads_end_with_the_envs(end, no_cycle_collector):
    before = number_of_threads()
    kept = []
    for _ in range(20):
        vec_env = BatchVecEnv("PointUMaze-v0", 4, 3)
        wrapped = VecNormalize(vec_env) if end == "close the wrapper" else vec_env
        wrapped.reset()
        wrapped.set_attr("goal", [2.0, 4.0])
        wrapped.step(np.zeros((4, 2)))
        assert number_of_threads() == before + 2
        batch = weakref.ref(vec_env.simulation.batch)
        if end != "del":
            wrapped.close()
            kept.append(vec_env)
        del vec_env, wrapped
        assert batch() is None and number_of_threads() == before


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("make", [partial(gym.make, "PointUMaze-v0"), partial(GoalEnv, robot="point", maze="u")])
def test_single_envs_are_freed(make, close, no_cycle_collector):
    env = make()
    env.reset()
    env.step(np.zeros(2))
    batch, core = weakref.ref(env.unwrapped.simulation.batch), weakref.ref(env.unwrapped)
    if close:
        env.close()
        assert batch() is None
        with pytest.raises(RuntimeError, match="The environment is closed"):
            env.step(np.zeros(2))
    del env
    assert batch() is None and core() is None


def test_bad_reset_options():
    vec_env = BatchVecEnv("PointUMaze-v0", 2)
    for options in (5, [{}] * 3):
        vec_env.set_options(options)
        with pytest.raises(ValueError, match="do not fit 2 envs"):
            vec_env.reset()
    vec_env.set_options([{}, 5])
    with pytest.raises(ValueError, match="Env 1: The reset options 5 are no dict"):
        vec_env.reset()


def test_foreign_id():
    with pytest.raises(ValueError, match="'Pendulum-v1' is no environment of this package"):
        BatchVecEnv("Pendulum-v1")


def test_bad_actions():
    vec_env = BatchVecEnv("AntU4Maze-v0", 3)
    with pytest.raises(RuntimeError, match=r"Call reset\(\)"):
        vec_env.step(np.zeros((3, 8)))
    vec_env.reset()
    with pytest.raises(ValueError, match=r"shape \(2, 8\), expected \(3, 8\)"):
        vec_env.step(np.zeros((2, 8)))
    actions = np.zeros((3, 8))
    actions[2, 5] = np.inf
    with pytest.raises(ValueError, match="env 2 is not finite: number 5 is inf"):
        vec_env.step(actions)


@pytest.mark.slow
def test_interrupt():
    """Ctrl-C ends a running loop at once, although native threads are at work."""
    code = (
        "import numpy as np\n"
        "from sb3_deepcrl.envs import BatchVecEnv, register_envs\n"
        "register_envs()\n"
        "env = BatchVecEnv('HumanoidUMaze-v0', 64, 2)\n"
        "env.reset()\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    env.step(np.zeros((64, 17), dtype=np.float32))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    watchdog.cancel()
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode != -signal.SIGKILL
