from dataclasses import replace

import gymnasium as gym
import gymnasium_robotics
import matplotlib
import numpy as np
import pytest
import torch as th
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from scipy.spatial.distance import cdist
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import MazeMap, ValueMapStudy, plot_value_map, value_correlations, value_map
from sb3_deepcrl.analysis.episodes import EVAL_SEED
from sb3_deepcrl.analysis.value_map import _correlate, _far_goals, _observations_at
from sb3_deepcrl.envs.layouts import LAYOUTS, make_layout
from tests.envs import GoalReachEnv
from tests.studies import TOY, check_files, write_all
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
            np.testing.assert_allclose(maze.positions(np.array([row, column])), xy)
            for shift in ([0.0, 0.0], [0.45, -0.45], [-0.45, 0.45]):
                assert maze.is_wall(xy + shift) == (layout[row][column] == 1)
    assert maze.extent == (-4.0, 4.0, -4.0, 4.0)
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
    batch = _observations_at(observation, xy, np.array([3.0, 4.0]))
    assert (batch["achieved_goal"] == xy).all()
    assert (batch["observation"] == np.hstack([xy, np.zeros((3, 1))])).all()
    assert (batch["desired_goal"] == [3.0, 4.0]).all()
    with pytest.raises(ValueError, match=r"must be x, y and perhaps z, got an array of shape \(4,\)"):
        _observations_at({"achieved_goal": np.zeros(4)}, xy, xy[0])


def test_height_is_kept():
    observation, _ = gym.make("HumanoidUMaze-v0").reset(seed=0)
    batch = _observations_at(observation, np.array([[3.0, 4.0]]), np.array([5.0, 6.0]))
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
        obs = {key: value[index : index + 1] for key, value in _observations_at(observation, xy, goal).items()}
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
    # It reads as the text of the maze, whose first row has the highest y
    assert ax.images[0].get_extent() == [-4, 4, -4, 4]
    walls = np.kron(MazeMap.from_env(maze_env).walls, np.ones((4, 4), dtype=bool))
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


# --- Ways around walls, and what the value knows of them ----------------------------------------------------------------


def maze_of(rows) -> MazeMap:
    return MazeMap.from_env(gym.make("PointUMaze-v0", maze=rows))


def test_way_around_the_wall_by_hand():
    # In cells: to the first corner of the wall, along its end, and from the second corner to the goal
    expected = np.hypot(0.5, 1.5) + 1 + np.hypot(0.5, 1.5)
    for env_id, start, goal, size in (
        ("PointUMaze-v0", (2.0, 2.0), (6.0, 2.0), 2.0),
        ("AntUMaze-v0", (4.0, 4.0), (12.0, 4.0), 4.0),
        ("PointMaze_UMaze-v3", (-1.0, 1.0), (-1.0, -1.0), 1.0),
    ):
        maze = MazeMap.from_env(gym.make(env_id))
        assert maze.distances(np.array([start]), np.array([goal])) == pytest.approx(expected * size)
        way = maze.shortest_way(np.array(start), np.array(goal))
        np.testing.assert_allclose(way[[0, -1]], [start, goal])
        assert np.linalg.norm(np.diff(way, axis=0), axis=1) == pytest.approx(size * np.hypot([0.5, 0, 0.5], [1.5, 1, 1.5]))


def test_straight_where_nothing_is_in_the_way():
    maze = maze_of(["######", "#r...#", "#....#", "#...g#", "######"])
    places = maze.places(3)
    assert places.shape == (12 * 9, 2)
    np.testing.assert_allclose(maze.distances(places, places), cdist(places, places), atol=1e-9)


def test_places_are_in_free_cells():
    maze = maze_of("u4")
    layout = make_layout("u4")
    np.testing.assert_allclose(maze.places(), layout.free * 2.0)
    places = maze.places(2)
    assert len(places) == 4 * len(layout.free)
    np.testing.assert_allclose(np.abs(places - np.repeat(layout.free * 2.0, 4, axis=0)), 0.5)


@pytest.mark.parametrize("name", ["u4", "big", "hardest"])
def test_ways_against_a_fine_grid(name):
    """On a grid with eight neighbors a way is at least as long as the shortest one, and at most 8.3 % longer."""
    maze, n = maze_of(name), 8
    points = maze.places(n)
    step = maze.cell_size / n
    index = {tuple(key): i for i, key in enumerate(np.rint(points / step - 0.5).astype(int).tolist())}
    edges = []
    for (row, column), i in index.items():
        for shift in ((1, 0), (0, 1), (1, 1), (1, -1)):
            sides = ((row + shift[0], column), (row, column + shift[1]))
            j = index.get((row + shift[0], column + shift[1]))
            # No step cuts a corner
            if j is not None and all(side in index for side in sides):
                edges.append((i, j, step * np.hypot(*shift)))
    first, last, lengths = zip(*edges, strict=True)
    graph = coo_array((lengths, (first, last)), shape=(len(points), len(points)))
    sources = np.random.default_rng(0).choice(len(points), 20, replace=False)
    on_grid = dijkstra(graph.tocsr(), directed=False, indices=sources)
    ways = maze.distances(points[sources], points)
    # Around corners the grid keeps half a step away
    assert (on_grid >= ways - 1e-9).all()
    assert (on_grid <= ways * 1.083 + step * 8).all()


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_ways_between_the_straight_line_and_the_steps_from_cell_to_cell(name):
    maze, layout = maze_of(name), make_layout(name)
    centers = maze.places()
    ways = maze.distances(centers, centers)
    cells = np.array([layout.distances(cell)[tuple(layout.free.T)] for cell in layout.free])
    np.testing.assert_allclose(ways, ways.T, atol=1e-9)
    assert (ways >= cdist(centers, centers) - 1e-9).all()
    assert (ways <= cells * maze.cell_size + 1e-9).all()


def test_no_way_leads_through_walls():
    walls = np.array([[True] * 5, [True, False, True, False, True], [True, True, False, True, True], [True] * 5])
    maze = MazeMap(walls, 1.0, np.zeros(2), np.eye(2), goals=np.zeros((0, 2)))
    free = maze.places()
    # Cells that touch at a corner are not connected
    np.testing.assert_array_equal(np.isfinite(maze.distances(free, free)), np.eye(3, dtype=bool))
    # Nor is there a way between two neighboring walls, or out of one
    maze = maze_of(["######", "#r##g#", "#.##.#", "#....#", "######"])
    ends = np.array([[3.0, 3.0], [3.0, 7.0]])
    assert maze.distances(ends[:1], ends[1:])[0, 0] == pytest.approx(4 + 2 * 2)
    assert np.isinf(maze.distances(np.array([[2.0, 4.0]]), ends)).all()
    assert maze.shortest_way(np.array([2.0, 4.0]), ends[0]).shape == (0, 2)


def test_known_values():
    maze = maze_of("u4")
    places, goals = maze.places(3), maze.places()
    ways, lines = maze.distances(places, goals), cdist(places, goals)
    found = _correlate(-ways, ways, lines)
    assert (found.goal, found.n_pairs, found.maze) == (None, 99 * 11, pytest.approx(1))
    assert found.straight < 0.95
    assert _correlate(-lines, ways, lines).straight == pytest.approx(1)
    assert _correlate(ways, ways, lines).maze == pytest.approx(-1)
    # Pairs without a way do not count
    ways[0] = np.inf
    found = _correlate(np.where(np.isinf(ways), 1e6, -ways), ways, lines)
    assert (found.n_pairs, found.maze) == (98 * 11, pytest.approx(1))


@pytest.mark.parametrize("env_id, goal", [("PointU4Maze-v0", (8.0, 2.0)), ("PointMaze_Medium-v3", (2.5, -2.5))])
def test_critic_that_knows_the_distance(env_id, goal, monkeypatch):
    env = gym.make(env_id)
    model, maze = make_model(env), MazeMap.from_env(env)

    def through_maze(obs, actions):
        places, goals = obs["achieved_goal"].double().numpy(), obs["desired_goal"][:1].double().numpy()
        return th.as_tensor(-maze.distances(places, goals))

    def through_walls(obs, actions):
        return -(obs["achieved_goal"] - obs["desired_goal"]).norm(dim=1, keepdim=True)

    monkeypatch.setattr(model.critic, "forward", through_maze)
    both, far = value_correlations(model, env, [goal], seed=0)
    n_places = 9 * len(maze.places())
    assert (both.goal, both.n_pairs, far.goal, far.n_pairs) == (None, n_places * n_places // 9, goal, n_places)
    # But for rounding, which tells apart what is equally far
    assert both.maze == pytest.approx(1, abs=1e-3)
    assert far.maze == pytest.approx(1, abs=1e-3)
    assert both.straight < 0.95
    monkeypatch.setattr(model.critic, "forward", through_walls)
    both, far = value_correlations(model, env, [goal], seed=0)
    assert both.straight == pytest.approx(1, abs=1e-3)
    assert far.straight == pytest.approx(1, abs=1e-3)
    assert far.maze < 0.95


def test_far_goals():
    # 10, 9, 8 and 7 cells from the start
    assert _far_goals(gym.make("PointU4MazeEval-v0"), seed=0).tolist() == [[8, 2], [10, 2], [10, 4], [10, 6]]
    assert _far_goals(gym.make("AntUMaze-v0", cell_size=2.0), seed=0).tolist() == [[6, 2], [6, 4], [6, 6], [4, 6]]
    env = gym.make("PointMaze_UMaze-v3")
    goals = _far_goals(env, seed=0)
    start = env.reset(seed=0)[0]["achieved_goal"]
    ways = MazeMap.from_env(env).distances(start[None], goals)[0]
    assert len(goals) > 1
    assert (np.diff(ways) <= 0).all()
    assert ways[-1] >= ways[0] / 2


def test_wrong_input():
    with pytest.raises(ValueError, match=r"goal \[0.0, 0.0\] lies in a wall or outside of the maze, which spans x from -1.0"):
        ValueMapStudy(env="PointU4Maze-v0", goal=(0, 0))
    with pytest.raises(ValueError, match="has no maze to draw"):
        ValueMapStudy(env="AntGoal-v0")
    with pytest.raises(ValueError, match="has no maze to draw"):
        value_correlations(make_model(), GoalReachEnv())
    with pytest.raises(ValueError, match="that of DeepCRL's critic, which SAC has not"):
        plot_value_map(SAC("MultiInputPolicy", gym.make("PointU4Maze-v0"), buffer_size=10), gym.make("PointU4Maze-v0"))
    with pytest.raises(ValueError, match=r"cannot be made with `env_kwargs` {'walls': 3}"):
        ValueMapStudy(env_kwargs={"walls": 3})


def test_study(tmp_path):
    study = ValueMapStudy(env="PointUMaze-v0", depths=(4, 8), goal=(6.0, 4.0), runs=tmp_path, **TOY)
    models = {
        depth: DeepCRL("MultiInputPolicy", "PointUMaze-v0", depth=depth, width=8, buffer_size=2000, seed=0) for depth in (4, 8)
    }
    write_all(study, depth_4=models[4], depth_8=models[8])
    report = study.run()
    text = check_files(report)
    keys = [(row["depth"], row["seed"], row["goal"]) for row in report.rows]
    assert keys == [(depth, seed, goal) for depth in (4, 8) for seed in (0, 1) for goal in ("all", "6 2", "6 4", "6 6")]
    assert [row["n_pairs"] for row in report.rows[:2]] == [63 * 7, 63]
    # The numbers are those of the saved models
    found = value_correlations(models[8], gym.make("PointUMazeEval-v0"), [[6, 6]], seed=EVAL_SEED)
    for row, expected in zip((report.rows[-4], report.rows[-1]), found, strict=True):
        assert row["correlation_maze"] == pytest.approx(expected.maze, abs=1e-4)
        assert row["correlation_straight"] == pytest.approx(expected.straight, abs=1e-4)
    assert "| depth | all pairs: way through the maze |" in text and "--goal 6.0 4.0" in text
    assert "63 places in all free cells with 7 goals" in text and "the 3 goals of PointUMazeEval-v0" in text
    maps = [ax for ax in report.figure.axes if ax.images]
    assert [ax.get_title() for ax in maps] == ["depth 4", "depth 8"]
    for ax in maps:
        lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
        # y runs to the right, x down; the start has noise
        assert lines["goal"] == [[4, 6]]
        assert lines["start"][0] == pytest.approx([2, 2], abs=0.2)
        assert lines["shortest way"][:: len(lines["shortest way"]) - 1] == [lines["start"][0], lines["goal"][0]]
        assert ax.get_ylim()[0] > ax.get_ylim()[1]
    # One scale of colors, in which both maps fit
    values = [ax.images[0].get_array() for ax in maps]
    limits = (min(map(np.min, values)), max(map(np.max, values)))
    assert [ax.images[0].get_clim() for ax in maps] == [limits, limits]
    # A longer study trains them further, and leaves their checkpoints
    for run in (replace(run, seed=seed) for run in study.settings().values() for seed in range(study.seeds)):
        path = run.read(tmp_path).model_path
        path.rename(path.with_name("rl_model_160_steps.zip"))
        other = DeepCRL("MultiInputPolicy", "PointUMaze-v0", depth=4, width=8, buffer_size=2000, seed=1)
        other.num_timesteps = 180
        other.save(path.with_name("rl_model_180_steps.zip"))
    write_all(replace(study, steps=320, n_evaluations=8))
    assert study.run().rows == report.rows
