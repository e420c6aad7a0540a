import numpy as np
import pytest

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import StitchingStudy
from sb3_deepcrl.analysis.stitching import _cells_by_distance, evaluate_distance
from sb3_deepcrl.envs.layouts import LAYOUTS, make_layout
from tests.studies import TOY, check_files, write_all


class MazePolicy:
    """
    Drives the point.

    :param name: Its maze
    :param way: "none" to stay, "straight" towards the goal or "maze" from cell to cell
    """

    def __init__(self, name: str, way: str = "maze", cell_size: float = 2.0):
        self.layout, self.way, self.cell_size = make_layout(name), way, cell_size
        self.first_observation: dict[str, np.ndarray] | None = None

    def next_place(self, position: np.ndarray, goal: np.ndarray) -> np.ndarray:
        cell, last = (np.rint(xy / self.cell_size).astype(int) for xy in (position, goal))
        distances = self.layout.distances(last)
        for step in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            if distances[tuple(cell + step)] == distances[tuple(cell)] - 1 >= 0:
                return (cell + step) * self.cell_size
        return goal

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        if self.first_observation is None:
            self.first_observation = {key: value.copy() for key, value in observation.items()}
        positions, goals = observation["achieved_goal"][:, :2], observation["desired_goal"][:, :2]
        places = positions
        if self.way != "none":
            places = goals if self.way == "straight" else np.stack(list(map(self.next_place, positions, goals)))
        return np.clip(2 * (places - positions) - 0.5 * observation["observation"][:, 2:4], -1, 1).astype(np.float32), None


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_cell_at_its_distance(name):
    layout = make_layout(name)
    distances = layout.distances(layout.starts[0])
    cells = _cells_by_distance(layout)
    assert list(cells) == list(range(1, distances.max() + 1))
    for distance, found in cells.items():
        assert (distances[tuple(found.T)] == distance).all()
    assert sum(map(len, cells.values())) == len(layout.free) - 1


def test_distances_need_one_start():
    with pytest.raises(ValueError, match="has 2: keep one"):
        _cells_by_distance(make_layout(["#####", "#rgr#", "#####"]))


@pytest.mark.parametrize(
    "way, expected",
    [
        ("none", [0, 0, 0, 0, 0, 0]),
        ("maze", [1, 1, 1, 1, 1, 1]),
        # Along the row of the start it is the way, and it ends at the wall above the other goals
        ("straight", [1, 1, None, None, 0, 0]),
    ],
)
def test_success_of_known_policies(way, expected):
    for distance, success in enumerate(expected, start=1):
        if success is not None:
            means = evaluate_distance(MazePolicy("u", way), "PointUMazeStitchEval-v0", distance, n_eval_episodes=2)
            assert (means["success_any"], means["success_last"]) == (success, success)
            assert (means["time_at_goal"] > 50) == bool(success)


def test_from_the_start_to_all_cells_equally_often():
    policy = MazePolicy("big", "none")
    cells = _cells_by_distance(make_layout("big"))[4]
    assert len(cells) == 2
    kwargs = dict(stitching=3, max_episode_steps=2)
    evaluate_distance(policy, "PointBigMazeEval-v0", 4, n_eval_episodes=6, env_kwargs=kwargs)
    assert (policy.first_observation["achieved_goal"] == [2, 2]).all()
    goals = policy.first_observation["desired_goal"] / 2
    assert sorted(goals.tolist()) == sorted(3 * cells.tolist())


def test_height_of_goals_is_kept():
    class Still(MazePolicy):
        def predict(self, observation, *args, **kwargs):
            super().predict(observation)
            return np.zeros((len(observation["achieved_goal"]), 17), dtype=np.float32), None

    policy = Still("u", "none")
    env_kwargs = dict(max_episode_steps=1)
    evaluate_distance(policy, "HumanoidUMazeStitch-v0", 5, n_eval_episodes=1, env_kwargs=env_kwargs)
    assert policy.first_observation["desired_goal"].tolist() == [[6, 4, 1.25]]


def test_wrong_input():
    with pytest.raises(ValueError, match="PointUMaze-v0 is trained on ways of all lengths: use PointUMazeStitch-v0"):
        StitchingStudy(env="PointUMaze-v0")
    for env_id in ("AntGoal-v0", "PointMaze_UMaze-v3"):
        with pytest.raises(ValueError, match=f"needs a maze of this package, got '{env_id}'"):
            StitchingStudy(env=env_id)


def test_any_maze_can_be_stitched():
    study = StitchingStudy(env="PointU4Maze-v0", env_kwargs={"stitching": 2, "random_start": False, "goal": "resample"})
    assert (study.eval_env, study._trained, study._distances) == ("PointU4MazeEval-v0", 2, list(range(1, 11)))


def test_study(tmp_path):
    study = StitchingStudy(depths=(4, 8), runs=tmp_path, **TOY)
    model = DeepCRL("MultiInputPolicy", "PointUMazeStitch-v0", depth=4, width=8, buffer_size=2000)
    write_all(study, depth_4=model, depth_8=model)
    report = study.run()
    text = check_files(report)
    assert [(row["depth"], row["seed"], row["distance"]) for row in report.rows] == [
        (depth, seed, distance) for depth in (4, 8) for seed in (0, 1) for distance in range(1, 7)
    ]
    assert [row["trained"] for row in report.rows[:6]] == [True] * 3 + [False] * 3
    # The goals that are farther than the next cell lie behind a corner, which nothing leads an untrained policy around
    assert all(row["success_any"] == 0 for row in report.rows if row["distance"] > 2)
    assert "start and goal are at most 3 cells apart" in text
    assert "Mean success on longer ways: 0.00 at depth 4, 0.00 at depth 8." in text


def test_figure_shows_what_was_trained():
    study = StitchingStudy(depths=(4, 8), seeds=2)
    scores = {4: np.array([[1.0] * 6, [0.5] * 6]), 8: np.ones((2, 6))}
    figure = study._figure(dict.fromkeys(("success_any", "time_at_goal"), scores))
    ax = figure.axes[0]
    assert ax.patches[0].get_extents().transformed(ax.transData.inverted()).intervalx == pytest.approx([0.5, 3.5])
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.75] * 6, [1.0] * 6]
