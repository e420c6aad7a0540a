import gymnasium as gym
import gymnasium_robotics
import matplotlib
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_deepcrl.analysis import MazeMap, plot_value_map, value_map
from sb3_deepcrl.analysis.value_map import observations_at
from tests.envs import GoalReachEnv
from tests.test_deepcrl import make_model

matplotlib.use("Agg")
gym.register_envs(gymnasium_robotics)


@pytest.fixture(scope="module")
def maze_env() -> gym.Env:
    return gym.make("PointMaze_Medium-v3")


def test_walls_are_where_the_env_has_them(maze_env):
    maze = MazeMap.from_env(maze_env)
    layout = maze_env.unwrapped.maze.maze_map
    assert maze.walls.shape == (8, 8)
    for row in range(8):
        for column in range(8):
            xy = maze_env.unwrapped.maze.cell_rowcol_to_xy((row, column))
            np.testing.assert_allclose(maze.centers(np.array(row), np.array(column)), xy)
            for shift in ([0.0, 0.0], [0.45, -0.45], [-0.45, 0.45]):
                assert maze.is_wall(xy + shift) == (layout[row][column] == 1)
    assert maze.limits() == (-4.0, 4.0, -4.0, 4.0)
    assert maze.is_wall(np.array([[100.0, 0.0], [0.0, -4.1]])).all()


def test_walls_of_our_own_mazes():
    env = gym.make("PointU4Maze-v0")
    maze, scene = MazeMap.from_env(env), env.unwrapped.task.scene
    assert maze.walls.shape == (7, 5)
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        assert not maze.is_wall(observation["desired_goal"])
        assert not maze.is_wall(observation["achieved_goal"])
    # Row 3, column 2 is a wall
    assert maze.is_wall(scene.cell_size * np.array([3.0, 2.0]))
    assert not maze.is_wall(scene.cell_size * np.array([3.0, 3.0]))


def test_env_without_a_maze():
    with pytest.raises(ValueError, match="has no maze to draw"):
        MazeMap.from_env(GoalReachEnv())
    with pytest.raises(ValueError, match="needs a single env, not a DummyVecEnv"):
        MazeMap.from_env(DummyVecEnv([GoalReachEnv]))


def test_observations_are_moved():
    observation, _ = GoalReachEnv().reset(seed=0)
    xy = np.array([[0.5, -0.5], [1.0, 2.0], [0.0, 0.0]])
    batch = observations_at(observation, xy, np.array([3.0, 4.0]))
    assert (batch["achieved_goal"] == xy).all()
    assert (batch["observation"] == np.hstack([xy, np.zeros((3, 1))])).all()
    assert (batch["desired_goal"] == [3.0, 4.0]).all()
    with pytest.raises(ValueError, match=r"must be x, y and perhaps z, got an array of shape \(4,\)"):
        observations_at({"achieved_goal": np.zeros(4)}, xy, xy[0])


def test_height_is_kept():
    observation, _ = gym.make("HumanoidUMaze-v0").reset(seed=0)
    batch = observations_at(observation, np.array([[3.0, 4.0]]), np.array([5.0, 6.0]))
    assert batch["achieved_goal"][0] == pytest.approx([3.0, 4.0, 1.4])
    assert batch["desired_goal"][0] == pytest.approx([5.0, 6.0, 1.25])
    assert batch["observation"][0, :3] == pytest.approx([3.0, 4.0, 1.4])


@pytest.mark.parametrize("normalize", [False, True])
def test_values_are_those_of_the_critic(normalize):
    env = DummyVecEnv([GoalReachEnv])
    model = make_model(VecNormalize(env) if normalize else env).learn(60)
    observation, _ = GoalReachEnv().reset(seed=0)
    xy, goal = np.array([[0.5, -0.5], [1.0, 2.0]]), np.array([-1.0, 1.0])
    values, actions = value_map(model, observation, xy, goal)
    for index in range(2):
        obs = {key: value[index : index + 1] for key, value in observations_at(observation, xy, goal).items()}
        if normalize:
            obs = model.get_vec_normalize_env().normalize_obs(obs)
        expected, _ = model.predict(obs, deterministic=True)
        np.testing.assert_allclose(actions[index], expected[0], rtol=1e-4, atol=1e-5)
        with th.no_grad():
            energy = model.critic(model.policy.obs_to_tensor(obs)[0], th.as_tensor(expected))
        assert values[index] == pytest.approx(energy.item(), rel=1e-4)


def test_pictures_read_as_the_text_of_the_maze():
    env = gym.make("PointU4Maze-v0")
    ax = plot_value_map(make_model(env), env, points_per_cell=2)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("y (m)", "x (m)")
    image = ax.images[0].get_array()
    # Row 4 of 7 has a wall in its middle
    assert image.shape == (14, 10)
    assert list(image.mask[8]) == [True] * 2 + [False] * 2 + [True] * 2 + [False] * 2 + [True] * 2
    bottom, top = ax.get_ylim()
    assert bottom > top


def test_plot(maze_env, tmp_path):
    model = make_model(gym.make("PointMaze_UMaze-v3"))
    ax = plot_value_map(model, maze_env, goal=[-2.5, 2.5], points_per_cell=4)
    image = ax.images[0].get_array()
    assert image.shape == (32, 32)
    # The first row of the picture is the lowest y, that of the maze the highest
    walls = np.kron(MazeMap.from_env(maze_env).walls[::-1], np.ones((4, 4), dtype=bool))
    assert (image.mask == walls).all()
    ax.figure.savefig(tmp_path / "map.png")
    with pytest.raises(ValueError, match="lies in a wall"):
        plot_value_map(model, maze_env, goal=[3.9, 3.9])


def test_a_bug_of_a_maze_is_not_taken_for_no_maze():
    env = gym.make("PointMaze_UMaze-v3")
    assert MazeMap.find(GoalReachEnv()) is None
    env.unwrapped.maze._maze_map = [[1, 1], [1]]
    with pytest.raises(ValueError, match="inhomogeneous"):
        MazeMap.find(env)
