import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_deepcrl.envs import OGBenchGoalWrapper, SingleGoalWrapper, SuccessInfoWrapper
from sb3_deepcrl.envs.arguments import checked_env_kwargs, default_env_kwargs
from tests.envs import EpisodeCounterEnv, GoalReachEnv


@pytest.fixture
def robotics():
    module = pytest.importorskip("gymnasium_robotics")
    gym.register_envs(module)


@pytest.mark.usefixtures("robotics")
def test_success_info_wrapper():
    env = SuccessInfoWrapper(gym.make("PointMaze_UMaze-v3", max_episode_steps=5))
    env.reset(seed=0)
    for at_goal in (False, True):
        if at_goal:
            env.unwrapped.goal = env.unwrapped.point_env.data.qpos[:2].copy()
        info = env.step(np.zeros(2, dtype=np.float32))[-1]
        assert info["is_success"] is bool(info["success"]) is at_goal
    # HER calls compute_reward through the vectorized environment, with more wrappers outside
    vec_env = DummyVecEnv([lambda: gym.wrappers.RecordEpisodeStatistics(SuccessInfoWrapper(gym.make("PointMaze_UMaze-v3")))])
    goals = np.zeros((4, 2))
    np.testing.assert_array_equal(vec_env.env_method("compute_reward", goals, goals, [{}] * 4, indices=[0])[0], np.ones(4))


def test_success_info_wrapper_leaves_is_success_alone():
    env = SuccessInfoWrapper(gym.make("PointUMaze-v0"))
    env.reset(seed=0)
    info = env.step(np.zeros(2, dtype=np.float32))[-1]
    assert info["is_success"] == info["success"]


def test_success_info_wrapper_needs_success():
    env = SuccessInfoWrapper(gym.make("CartPole-v1"))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="has no key `success`"):
        env.step(0)


CHECKS = """
import sys, mujoco, numpy as np
joint = mujoco.mjtJoint.mjJNT_SLIDE
# As before MuJoCo 3.12, and all else as it is
assert joint == np.int32(2) and not joint != np.int32(2) and np.int32(2) == joint and joint == 2 == hash(joint)
assert joint != np.int32(3) and joint != 3 and joint is not None and joint != "slide" and joint != mujoco.mjtJoint.mjJNT_HINGE
"""


@pytest.mark.parametrize(
    "lines",
    [
        "import gymnasium_robotics, sb3_deepcrl; gym.make('FetchReach-v4')",
        "import sb3_deepcrl, gymnasium_robotics; gym.make('HandReach-v3').reset()",
        "import sb3_deepcrl; gym.make('gymnasium_robotics:FetchPush-v4').reset()",
    ],
)
def test_importing_this_package_repairs_gymnasium_robotics(lines):
    # In a process where nobody has imported it yet
    code = f"import gymnasium as gym; {lines}\n{CHECKS}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("env_id, size", [("pointmaze-medium-v0", 2), ("antsoccer-arena-v0", 42)])
def test_ogbench(env_id, size):
    pytest.importorskip("ogbench")
    env = OGBenchGoalWrapper(gym.make(env_id, terminate_at_goal=False))
    check_env(env, warn=False)
    assert env.observation_space["observation"].shape == (size,)
    outside = np.random.get_state()[1].copy()
    runs = []
    for _ in range(2):
        observation, _ = env.reset(seed=3)
        runs.append([observation["desired_goal"], observation["observation"], env.reset()[0]["observation"]])
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
    assert (env.reset(seed=4)[0]["observation"] != runs[0][1]).any()
    np.testing.assert_array_equal(np.random.get_state()[1], outside)
    _, reward, terminated, _, info = env.step(np.zeros(env.action_space.shape, dtype=np.float32))
    assert (reward, info["is_success"], terminated) == (0, False, False)
    assert env.compute_reward(np.zeros((3, 2)), np.full((3, 2), 5.0), [{}] * 3).tolist() == [0, 0, 0]
    assert env.compute_reward(np.zeros(2), np.array([env.tolerance, 0]), {}) == 1


@pytest.mark.parametrize("wrapper", [OGBenchGoalWrapper, SingleGoalWrapper, SuccessInfoWrapper])
def test_wrappers_are_part_of_the_spec(wrapper):
    assert issubclass(wrapper, gym.utils.RecordConstructorArgs)


def test_ogbench_wrapper_refuses_others():
    with pytest.raises(ValueError, match="no maze of OGBench"):
        OGBenchGoalWrapper(gym.make("Pendulum-v1"))


@pytest.mark.parametrize(
    ("make", "goal"), [(lambda: gym.make("PointUMazeEval-v0"), [2.5, 3.5]), (lambda: GoalReachEnv(max_steps=50), [1.0, 0.5])]
)
def test_single_goal(make, goal):
    env = SingleGoalWrapper(make(), goal)
    check_env(env, warn=False)
    observation, _ = env.reset(seed=0)
    rewards, successes = [], []
    for _ in range(50):
        step = env.unwrapped.action_space.high * np.sign(env.goal - observation["achieved_goal"])
        observation, reward, _, _, info = env.step(step.astype(np.float32))
        np.testing.assert_array_equal(observation["desired_goal"], goal)
        rewards.append(reward)
        successes.append((info["is_success"], info["success"]))
    # Those of the goal, whatever the env wanted
    assert [(reward == 1.0, reward == 1.0) for reward in rewards] == successes and 0 < sum(rewards) < 50


def test_single_goal_with_dense_rewards():
    env = SingleGoalWrapper(gym.make("PointUMaze-v0", reward_type="dense"), [2.5, 3.5])
    observation, _ = env.reset(seed=0)
    near = SingleGoalWrapper(env, observation["achieved_goal"] + 0.1)
    for wrapped, success in ((env, False), (near, True)):
        wrapped.reset(seed=0)
        assert wrapped.step(np.zeros(2, dtype=np.float32))[-1]["is_success"] is success


def test_single_goal_is_the_goal_of_envs_that_can_be_asked():
    goal = np.array([2.5, 3.5], dtype=np.float32)
    env = SingleGoalWrapper(gym.make("PointUMaze-v0", goal="continuing"), goal)
    reached = 0
    for seed in range(3):
        observation, info = env.reset(seed=seed, options={"start": [2.0, 2.0]})
        for _ in range(30):
            distance = np.linalg.norm(observation["achieved_goal"] - goal)
            assert info["distance"] == pytest.approx(distance, abs=1e-6) and info["is_success"] == (distance < 0.5)
            np.testing.assert_array_equal(env.unwrapped.goal, goal)
            reached += info["is_success"]
            step = env.action_space.high * np.sign(goal - observation["achieved_goal"])
            observation, _, _, _, info = env.step(step.astype(np.float32))
    assert reached > 3
    with pytest.raises(ValueError, match="wall"):
        SingleGoalWrapper(gym.make("PointUMaze-v0"), [0.0, 0.0]).reset()


def test_single_goal_needs_compute_reward():
    with pytest.raises(ValueError, match="has no `compute_reward`"):
        SingleGoalWrapper(EpisodeCounterEnv(), [0.0, 0.0, 0.0])


def test_goals_that_are_none():
    for goal in ([1.0, 2.0, 3.0], [np.nan, 0.0]):
        with pytest.raises(ValueError, match=r"`goal` must be finite and of shape \(2,\)"):
            SingleGoalWrapper(gym.make("PointUMaze-v0"), goal)
    with pytest.raises(ValueError, match="have no `desired_goal`"):
        SingleGoalWrapper(gym.make("Pendulum-v1"), [0.0])


@pytest.mark.usefixtures("robotics")
def test_arguments_of_envs():
    # Of this package, of one that hands on arguments, and of one that does not
    for env_id, wrong, advice in (
        ("AntUMaze-v0", "maez", "Did you mean 'maze'"),
        ("PointMaze_UMaze-v3", "mazemap", "Did you mean 'maze_map'"),
        ("Pendulum-v1", "walls", "Choose from: render_mode, g, max_episode_steps"),
    ):
        with pytest.raises(ValueError, match=rf"{env_id} cannot be made .* it has no argument '{wrong}'\. {advice}"):
            with checked_env_kwargs(gym.spec(env_id), {wrong: 3}):
                gym.make(env_id, **{wrong: 3})
        with checked_env_kwargs(gym.spec(env_id), {"max_episode_steps": 3}):
            gym.make(env_id, max_episode_steps=3)
    # An error that is no unknown argument of the env is left alone
    with pytest.raises(TypeError, match="other"), checked_env_kwargs(gym.spec("AntUMaze-v0"), {"maze": "u"}):
        raise TypeError("got an unexpected keyword argument 'other'")
    made_with = default_env_kwargs(gym.spec("AntU4Maze-v0"))
    assert (made_with["robot"], made_with["maze"], made_with["goal"], made_with["max_episode_steps"]) == (
        "ant",
        "u4",
        "resample",
        1000,
    )
