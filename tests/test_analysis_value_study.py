import csv

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import pytest
import torch as th
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from scipy.stats import spearmanr

import sb3_deepcrl.analysis.runs
from sb3_deepcrl.analysis import DepthStudy, MazeMap, ValueMapStudy, value_correlations
from sb3_deepcrl.analysis.cli import main
from sb3_deepcrl.analysis.runs import EVAL_SEED, load_model, make_single_env
from sb3_deepcrl.analysis.statistics import rank_correlation
from sb3_deepcrl.analysis.value_study import check_goals, correlate, far_goals, straight_distances
from sb3_deepcrl.envs.layouts import LAYOUTS, make_layout
from tests.envs import GoalReachEnv
from tests.test_deepcrl import make_model

gym.register_envs(gymnasium_robotics)

# A study that takes seconds
TOY = (
    "--depths 4 8 --seeds 2 --steps 64 --n-evaluations 1 --n-eval-episodes 4 --n-envs 4 --width 8 --batch-size 16 "
    "--hyperparams repr_dim:4 learning_starts:32 --env-kwargs max_episode_steps:20 --jobs 1"
).split()


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


def test_straight_where_nothing_is_in_the_way():
    maze = maze_of(["######", "#r...#", "#....#", "#...g#", "######"])
    places = maze.places(3)
    assert places.shape == (12 * 9, 2)
    np.testing.assert_allclose(maze.distances(places, places), straight_distances(places, places), atol=1e-9)


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
    assert (ways >= straight_distances(centers, centers) - 1e-9).all()
    assert (ways <= cells * maze.cell_size + 1e-9).all()


def test_no_way_leads_through_walls():
    walls = np.array([[True] * 5, [True, False, True, False, True], [True, True, False, True, True], [True] * 5])
    maze = MazeMap(walls, 1.0, np.zeros(2), column_step=np.array([0.0, 1.0]), row_step=np.array([1.0, 0.0]))
    free = maze.places()
    # Cells that touch at a corner are not connected
    np.testing.assert_array_equal(np.isfinite(maze.distances(free, free)), np.eye(3, dtype=bool))
    # Nor is there a way between two neighboring walls, or out of one
    maze = maze_of(["######", "#r##g#", "#.##.#", "#....#", "######"])
    ends = np.array([[3.0, 3.0], [3.0, 7.0]])
    assert maze.distances(ends[:1], ends[1:])[0, 0] == pytest.approx(4 + 2 * 2)
    assert np.isinf(maze.distances(np.array([[2.0, 4.0]]), ends)).all()


def test_rank_correlation():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 10, 50), rng.integers(0, 10, 50)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation(first, np.exp(first)) == pytest.approx(1)
    assert np.isnan(rank_correlation(first, np.ones(50)))


def test_known_values():
    maze = maze_of("u4")
    places, goals = maze.places(3), maze.places()
    ways, lines = maze.distances(places, goals), straight_distances(places, goals)
    found = correlate(-ways, ways, lines)
    assert (found.goal, found.n_pairs, found.maze) == (None, 99 * 11, pytest.approx(1))
    assert found.straight < 0.95
    assert correlate(-lines, ways, lines).straight == pytest.approx(1)
    assert correlate(ways, ways, lines).maze == pytest.approx(-1)
    # Pairs without a way do not count
    ways[0] = np.inf
    found = correlate(np.where(np.isinf(ways), 1e6, -ways), ways, lines)
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
    assert far_goals(gym.make("PointU4MazeEval-v0"), seed=0).tolist() == [[8, 2], [10, 2], [10, 4], [10, 6]]
    assert far_goals(gym.make("AntUMaze-v0", cell_size=2.0), seed=0).tolist() == [[6, 2], [6, 4], [6, 6], [4, 6]]
    env = gym.make("PointMaze_UMaze-v3")
    goals = far_goals(env, seed=0)
    start = env.reset(seed=0)[0]["achieved_goal"]
    ways = MazeMap.from_env(env).distances(start[None], goals)[0]
    assert len(goals) > 1
    assert (np.diff(ways) <= 0).all()
    assert ways[-1] >= ways[0] / 2


def test_wrong_input():
    with pytest.raises(ValueError, match=r"goal \[0.0, 0.0\] lies in a wall or outside of the maze, which spans x from -1.0"):
        ValueMapStudy(env="PointU4Maze-v0", goal=(0, 0))
    with pytest.raises(ValueError, match=r"must be x and y each, shape \(n, 2\), got shape \(1, 3\)"):
        check_goals(maze_of("u"), [[2.0, 2.0, 0.0]])
    with pytest.raises(ValueError, match="has no maze to draw"):
        ValueMapStudy(env="AntGoal-v0")
    with pytest.raises(ValueError, match="has no maze to draw"):
        value_correlations(make_model(), GoalReachEnv())
    with pytest.raises(ValueError, match=r"cannot be made with `env_kwargs` {'walls': 3}"):
        ValueMapStudy(env_kwargs={"walls": 3})
    with pytest.raises(ValueError, match="`depth` must be a positive multiple of 4"):
        ValueMapStudy(depths=[4, 6])
    with pytest.raises(ValueError, match="`depth=8`, which this study sets itself: use `depths`"):
        ValueMapStudy(hyperparams={"depth": 8})


def test_models_are_those_of_the_depth_study():
    assert ValueMapStudy(depths=[4, 8]).settings() == DepthStudy(depths=[4, 8]).settings()


def test_toy_study(tmp_path, monkeypatch, capsys):
    argv = ["value_map", "--env", "PointUMaze-v0", "--goal", "6", "4", *TOY, "--runs", str(tmp_path)]
    main(argv)
    with (tmp_path / "value_map-PointUMaze-v0.csv").open() as file:
        rows = list(csv.DictReader(file))
    goals = ["all", "6 2", "6 4", "6 6"]
    keys = [(row["depth"], row["seed"], row["goal"]) for row in rows]
    assert keys == [(depth, seed, goal) for depth in ("4", "8") for seed in ("0", "1") for goal in goals]
    assert [int(row["n_pairs"]) for row in rows[:2]] == [63 * 7, 63]
    # The numbers are those of the saved models
    study = ValueMapStudy(
        env="PointUMaze-v0",
        goal=(6, 4),
        depths=[4, 8],
        seeds=2,
        steps=64,
        n_evaluations=1,
        n_eval_episodes=4,
        n_envs=4,
        width=8,
        batch_size=16,
        hyperparams=dict(repr_dim=4, learning_starts=32),
        env_kwargs=dict(max_episode_steps=20),
    )
    model = load_model(study.seeds_of(study.settings()["depth 8"])[1], tmp_path)
    assert (model.policy.depth, model.num_timesteps) == (8, int(rows[-1]["timesteps"]))
    found = value_correlations(model, make_single_env("PointUMazeEval-v0"), [[6, 6]], seed=EVAL_SEED)
    for row, expected in zip((rows[-4], rows[-1]), found, strict=True):
        assert float(row["correlation_maze"]) == pytest.approx(expected.maze, abs=1e-4)
        assert float(row["correlation_straight"]) == pytest.approx(expected.straight, abs=1e-4)
    text = (tmp_path / "value_map-PointUMaze-v0.md").read_text()
    assert "| depth | all pairs: way through the maze |" in text
    assert "63 places in all free cells with 7 goals" in text
    assert "the 3 goals of PointUMazeEval-v0" in text
    assert "x = 6, y = 4 (star)" in text

    # Called again, from Python, nothing is trained, and the report is the same
    monkeypatch.setattr(sb3_deepcrl.analysis.runs, "make_model", None)
    report = study.run(tmp_path, jobs=1)
    assert report.path == tmp_path / "value_map-PointUMaze-v0.md"
    assert report.path.read_text() == text
    assert "--goal 6.0 4.0" in text
    assert [{name: str(value) for name, value in row.items()} for row in report.rows] == rows
    maps = [ax for ax in report.figure.axes if ax.images]
    assert [ax.get_title() for ax in maps] == ["depth 4", "depth 8"]
    for ax in maps:
        lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
        # y runs to the right, x down; the start has noise
        assert lines["goal"] == [[4, 6]]
        assert lines["start"][0] == pytest.approx([2, 2], abs=0.2)
        assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_errors_of_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["value_map", "--goal", "0", "0", "--runs", str(tmp_path)])
    assert "lies in a wall" in capsys.readouterr().err
