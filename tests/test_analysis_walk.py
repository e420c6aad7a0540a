import re

import gymnasium as gym
import numpy as np
import pytest

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import MazeMap, WalkStudy, record_trajectories, walk_episodes
from sb3_deepcrl.analysis.cli import main
from sb3_deepcrl.analysis.runs import load_model, read_rows
from sb3_deepcrl.analysis.walk import (
    CLASSES,
    Gaits,
    Trajectory,
    classify,
    goes_over_wall,
    heights_over_time,
    longest_stay,
    maze_of,
    shares,
    walk_episode,
)
from tests.test_analysis_runs import TOY_OPTIONS

DT = 0.015
SECOND = 67


def trajectory(*places, goal=(8.0, 2.0), fall: bool = False, heights=None) -> Trajectory:
    """
    A straight way from place to place, each with the step at which it is reached.

    :param places: Steps and places, ``(step, x, y)``
    :param goal: The goal
    :param fall: Whether the last step is a fall
    :param heights: Height of the torso at all times
    :return: What would be recorded
    """
    steps, x, y = zip(*places, strict=True)
    times = np.arange(steps[-1] + 1)
    height = np.full(len(times), 1.3) if heights is None else np.array(heights)
    if fall:
        height[-1] = 0.99
    positions = np.stack([np.interp(times, steps, x), np.interp(times, steps, y), height], axis=1)
    goals = np.tile([*goal, 1.25], (len(times), 1))
    distances = np.linalg.norm(positions - goals, axis=1)
    healthy = (height >= 1.0) & (height <= 2.0)
    return Trajectory(positions, goals, healthy[1:], distances[1:] < 0.5, DT)


@pytest.fixture(scope="module")
def maze() -> MazeMap:
    # Cells of 2 m. The wall of the U is row 2 (x from 3 to 5 m), free at its end in column 3 (y from 5 to 7 m)
    found = maze_of("HumanoidUMazeEval-v0")
    assert found is not None
    assert found.cell_size == 2.0
    return found


# --- Classes of known trajectories ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, places, fall",
    [
        # To the goal and stays there
        ("walks", [(0, 2, 2), (400, 8, 2), (1000, 8, 2)], False),
        # The same, and falls later than 1.5 s
        ("walks", [(0, 2, 2), (400, 8, 2), (520, 8, 2)], True),
        # Never falls, never arrives
        ("walks", [(0, 2, 2), (1000, 4, 2)], False),
        # Starts at the goal
        ("walks", [(0, 8.1, 2), (50, 8.1, 2)], False),
        ("stands", [(0, 2, 2), (500, 2.4, 2), (1000, 2, 2)], False),
        # Runs through the goal, and falls before it has stayed
        ("falls at the goal", [(0, 2, 2), (400, 8, 2), (440, 8, 2)], True),
        # Throws itself at the goal, and comes to lie 1.9 m before it
        ("falls at the goal", [(0, 2, 2), (100, 6.1, 2)], True),
        # 2.1 m before it
        ("falls on the way", [(0, 2, 2), (100, 5.9, 2)], True),
        # Starts 1.5 m away, and falls where it is
        ("falls on the way", [(0, 6.5, 2), (40, 6.8, 2)], True),
        # ... or after 0.4 or 0.6 of the distance
        ("falls on the way", [(0, 6.5, 2), (40, 7.1, 2)], True),
        ("falls at the goal", [(0, 6.5, 2), (40, 7.4, 2)], True),
        # Falls away from the goal
        ("falls on the way", [(0, 7, 2), (40, 6.2, 2)], True),
        ("falls on the way", [(0, 2, 2), (40, 2, 2)], True),
    ],
)
def test_classes_on_the_field(kind, places, fall):
    assert classify(trajectory(*places, fall=fall)) == kind


@pytest.mark.parametrize(
    "kind, places, fall",
    [
        # Around the wall
        ("walks", [(0, 2, 2), (300, 2, 6), (500, 6, 6), (800, 6, 2), (1000, 6, 2)], False),
        # Over it, and stays at the goal, or falls behind it, or on it
        ("goes over the wall", [(0, 2, 2), (400, 6, 2), (1000, 6, 2)], False),
        ("goes over the wall", [(0, 2, 2), (300, 5.5, 2)], True),
        ("goes over the wall", [(0, 2, 2), (300, 3.6, 2)], True),
        # Leans over it by 0.4 m and falls there
        ("falls on the way", [(0, 2, 2), (100, 2.6, 2), (300, 3.4, 2)], True),
        # The same 1.3 m from the goal, as the crow flies
        ("falls at the goal", [(0, 2, 2), (300, 3.4, 2)], "near"),
        # Over the outer wall
        ("goes over the wall", [(0, 2, 2), (300, 2, 0.2)], True),
    ],
)
def test_classes_in_a_maze(maze, kind, places, fall):
    goal = (4.7, 2.0) if fall == "near" else (6.0, 2.0)
    assert classify(trajectory(*places, goal=goal, fall=bool(fall)), maze) == kind


def test_a_fall_is_only_the_first_one():
    # Not terminated when unhealthy: gets up again and walks to the goal
    heights = np.full(1001, 1.3)
    heights[200:210] = 0.9
    fallen = trajectory((0, 2.0, 2.0), (400, 8.0, 2.0), (1000, 8.0, 2.0), heights=heights)
    assert fallen.fall_step == 200
    assert classify(fallen) == "falls on the way"
    episode = walk_episode(fallen)
    assert not episode.reached
    assert episode.time_at_goal == 0
    assert episode.final_distance == pytest.approx(np.hypot(3.0, 1.25 - 0.9))
    # As high as no humanoid stands
    assert trajectory((0, 2.0, 2.0), (3, 2.0, 2.0), heights=[1.3, 1.9, 2.1, 1.3]).fall_step == 2


def test_over_a_wall_means_well_inside(maze):
    # The wall of row 2 is 2 m deep: from x = 3 to 5
    x = np.array([2.9, 3.1, 3.45, 3.55, 4.0, 4.45, 4.55, 5.1])
    over = [False, False, False, True, True, True, False, False]
    assert goes_over_wall(np.stack([x, np.full(8, 2.0), np.full(8, 1.4)], axis=1), maze).tolist() == over
    # It is free at its end, from y = 5 on
    y = np.array([4.0, 4.45, 4.55, 6.0])
    assert goes_over_wall(np.stack([np.full(4, 4.0), y], axis=1), maze).tolist() == [True, True, False, False]


def test_longest_stay():
    assert longest_stay(np.array([], dtype=bool)) == 0
    assert longest_stay(np.array([False, False])) == 0
    assert longest_stay(np.array([True, False, True, True, True, False, True, True])) == 3


# --- Numbers of known trajectories ------------------------------------------------------------------------------------


def test_numbers_of_an_episode():
    # 3 m along x, then 4 m along y, 1 m before the goal
    heights = np.linspace(1.4, 1.2, 701)
    episode = walk_episode(trajectory((0, 0.0, 0.0), (300, 3.0, 0.0), (700, 3.0, 4.0), goal=(3.0, 5.0), heights=heights))
    assert (episode.steps, episode.fall_step) == (700, None)
    assert episode.mean_height == pytest.approx(1.3)
    assert episode.min_height == pytest.approx(1.2)
    assert episode.distance_travelled == pytest.approx(7.0)
    assert episode.start_distance == pytest.approx(np.sqrt(3**2 + 5**2 + 0.15**2))
    assert episode.final_distance == episode.closest_distance == pytest.approx(np.hypot(1.0, 0.05))
    assert (episode.reached, episode.time_at_goal) == (False, 0)


def test_closest_and_final_distance_differ():
    episode = walk_episode(trajectory((0, 0.0, 0.0), (100, 3.0, 0.0), (200, 0.0, 0.0), goal=(3.0, 0.0), fall=True))
    assert episode.fall_step == 200
    assert episode.closest_distance == pytest.approx(0.05)
    assert episode.final_distance == pytest.approx(np.hypot(3.0, 1.25 - 0.99))
    assert episode.reached
    # 0.5 m at 0.03 m a step, there and back
    assert episode.time_at_goal == pytest.approx(33, abs=1)
    assert episode.min_height == 0.99


def test_sway_is_no_way():
    # 0.02 m to and fro ten times a second
    times = np.arange(1001)
    swaying = trajectory((0, 0.0, 0.0), (1000, 0.0, 0.0))
    swaying.positions[:, 0] = 0.02 * np.sin(2 * np.pi * 10 * times * DT)
    assert np.abs(np.diff(swaying.positions[:, 0])).sum() > 10
    assert walk_episode(swaying).distance_travelled < 1


def test_shares_and_heights():
    fallen = trajectory((0, 0.0, 0.0), (3, 0.0, 0.0), fall=True)
    standing = trajectory((0, 0.0, 0.0), (5, 0.0, 0.0))
    episodes = [walk_episode(fallen), walk_episode(standing), walk_episode(standing), walk_episode(standing)]
    assert dict(zip(CLASSES, shares(episodes), strict=True)) == {
        "walks": 0.0,
        "goes over the wall": 0.0,
        "stands": 0.75,
        "falls at the goal": 0.0,
        "falls on the way": 0.25,
    }
    heights, upright = heights_over_time([fallen, standing])
    assert upright.tolist() == [[True, True, True, False, False, False], [True] * 6]
    np.testing.assert_array_equal(heights, [[1.3, 1.3, 1.3, 0.99, np.nan, np.nan], [1.3] * 6])


def test_report_of_known_gaits():
    study = WalkStudy(env="HumanoidGoal-v0", depths=[4, 64], seeds=2)
    walking = trajectory((0, 2.0, 2.0), (400, 8.0, 2.0), (1000, 8.0, 2.0))
    thrown = trajectory((0, 2.0, 2.0), (100, 6.1, 2.0), fall=True)
    gaits = {}
    for label, recorded in {"depth 4": [thrown, thrown, thrown, walking], "depth 64": [walking] * 4}.items():
        episodes = [walk_episode(episode) for episode in recorded]
        gaits[label] = Gaits([1000, 2000], [recorded] * 2, [episodes] * 2)
    report = study.report_of(gaits)
    table = {row[""]: (row["depth 4"], row["depth 64"]) for row in report.table}
    assert [estimate.mean for estimate in table["walks"]] == [0.25, 1.0]
    assert [estimate.mean for estimate in table["falls at the goal"]] == [0.75, 0.0]
    assert table["fall after (s)"] == ("1.5", "-")
    assert table["reached the goal"] == ("0.25", "1.00")
    assert table["mean height of the torso (m)"] == ("1.30", "1.30")
    assert table["distance travelled (m)"] == ("4.10", "6.00")
    assert [(row["setting"], row["seed"], row["timesteps"], row["episode"]) for row in report.rows] == [
        (label, seed, timesteps, episode)
        for label in gaits
        for seed, timesteps in enumerate((1000, 2000))
        for episode in range(4)
    ]
    assert [row["fall_step"] for row in report.rows[:4]] == [100, 100, 100, ""]
    _, upright, bars = report.figure.axes
    shallow, deep = (line.get_ydata() for line in upright.lines)
    assert [shallow[99], shallow[100], shallow[1000]] == [1.0, 0.25, 0.25]
    assert list(deep) == [1.0] * 1001
    # One bar for each class and depth
    assert len(bars.patches) == 2 * len(CLASSES)
    tops = [patch.get_y() + patch.get_height() for patch in bars.patches[-2:]]
    assert tops == pytest.approx([1.0, 1.0])


# --- Recorded episodes ------------------------------------------------------------------------------------------------


class Still:
    """A policy that does nothing."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.zeros((len(observation["achieved_goal"]), 17), dtype=np.float32), state


def test_recorded_trajectories_are_those_of_the_env():
    recorded = record_trajectories(Still(), "HumanoidUMaze-v0", 3, {"max_episode_steps": 200}, seed=7)
    assert len(recorded) == 3
    for index, found in enumerate(recorded):
        env = gym.make("HumanoidUMaze-v0", max_episode_steps=200)
        observation, _ = env.reset(seed=7 + index)
        positions, done = [observation["achieved_goal"]], False
        while not done:
            observation, _, terminated, truncated, info = env.step(np.zeros(17, dtype=np.float32))
            positions.append(observation["achieved_goal"])
            done = terminated or truncated
        np.testing.assert_array_equal(found.positions, positions)
        np.testing.assert_array_equal(found.goals, np.tile(observation["desired_goal"], (len(positions), 1)))
        assert found.fall_step == len(positions) - 1
        assert terminated
        assert not info["is_healthy"]
        assert found.dt == pytest.approx(0.015)


@pytest.mark.parametrize("env_id, dt", [("HumanoidGoal-v0", 0.03), ("HumanoidU4MazeEval-v0", 0.015)])
def test_episodes_of_an_existing_model(tmp_path, env_id, dt):
    model = DeepCRL("MultiInputPolicy", env_id, depth=4, width=8, buffer_size=2000)
    model.save(tmp_path / "model")
    model = DeepCRL.load(tmp_path / "model")
    # Time for a fall, and none
    fallen = walk_episodes(model, env_id, 2, {"max_episode_steps": 300})
    assert {episode.kind for episode in fallen} <= {"falls on the way", "falls at the goal"}
    assert all(episode.fall_step == episode.steps < 300 and episode.min_height < 1 for episode in fallen)
    standing = walk_episodes(model, env_id, 2, {"max_episode_steps": 3})
    assert [(episode.kind, episode.steps, episode.fall_step) for episode in standing] == [("stands", 3, None)] * 2
    assert record_trajectories(model, env_id, 1, {"max_episode_steps": 3})[0].dt == pytest.approx(dt)
    lying = record_trajectories(model, env_id, 1, {"max_episode_steps": 300, "terminate_when_unhealthy": False})[0]
    assert len(lying.healthy) == 300
    assert lying.fall_step is not None


def test_walk_study(tmp_path):
    options = [*TOY_OPTIONS, "--env", "HumanoidUMaze-v0", "--depths", "4", "8", "--seeds", "2", "--n-evaluations", "2"]
    main(["walk", *options, "--env-kwargs", "max_episode_steps:60", "--runs", str(tmp_path), "--jobs", "1"])
    rows = read_rows([tmp_path / "walk-HumanoidUMaze-v0.csv"])
    assert [(row["setting"], row["seed"], row["timesteps"], row["episode"]) for row in rows] == [
        (label, str(seed), "160", str(episode))
        for label in ("depth 4", "depth 8")
        for seed in range(2)
        for episode in range(4)
    ]
    study = WalkStudy(
        env="HumanoidUMaze-v0",
        depths=[4, 8],
        seeds=2,
        steps=160,
        n_evaluations=2,
        n_eval_episodes=4,
        n_envs=4,
        transitions_per_update=8,
        width=8,
        batch_size=8,
        precision="float32",
        env_kwargs={"max_episode_steps": 60},
        hyperparams={"learning_starts": 40, "buffer_size": 4000},
    )
    run = study.seeds_of(study.settings()["depth 8"])[1]
    expected = walk_episodes(load_model(run, tmp_path), "HumanoidUMazeEval-v0", 4, {"max_episode_steps": 60})
    for row, episode in zip(rows[-4:], expected, strict=True):
        assert row["kind"] == episode.kind
        assert row["fall_step"] == ("" if episode.fall_step is None else str(episode.fall_step))
        assert float(row["distance_travelled"]) == pytest.approx(episode.distance_travelled, abs=1e-4)
    text = (tmp_path / "walk-HumanoidUMaze-v0.md").read_text()
    first = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert first[: 1 + len(CLASSES)] == ["", *CLASSES]
    assert "Trained on HumanoidUMaze-v0." in text and "Each run: 160 env steps of 4 envs" in text
    assert (tmp_path / "walk-HumanoidUMaze-v0.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_input():
    message = "'PointUMaze-v0' is no such env of this package: use for instance HumanoidGoal-v0 or HumanoidUMaze-v0"
    with pytest.raises(ValueError, match=message):
        WalkStudy(env="PointUMaze-v0")
    with pytest.raises(ValueError, match=message):
        WalkStudy(eval_env="PointUMaze-v0")
    with pytest.raises(ValueError, match=message):
        record_trajectories(Still(), "PointUMaze-v0")
    with pytest.raises(ValueError, match=re.escape("`n_episodes` must be at least 1, got 0")):
        walk_episodes(Still(), "HumanoidGoal-v0", 0)
    with pytest.raises(ValueError, match=r"`depth` must be a positive multiple of 4, .*, got 3"):
        WalkStudy(depths=[3])
