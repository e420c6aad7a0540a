import gymnasium as gym
import numpy as np
import pytest

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import MazeMap, WalkStudy, walk_episodes
from sb3_deepcrl.analysis.episodes import Episode, make_env, make_envs, play_episodes, record_episodes
from sb3_deepcrl.analysis.walk import CLASSES, _goes_over_wall, _longest_stay, _shares, measure_walk
from tests.studies import TOY, check_files, write_all

DT = 0.015


def trajectory(*places, goal=(8.0, 2.0), fall: bool = False, heights=None) -> Episode:
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
    at_goal = np.linalg.norm(positions - goals, axis=1) < 0.5
    healthy = (height >= 1.0) & (height <= 2.0)
    infos = [{"is_healthy": healthy[i], "is_success": at_goal[i]} for i in times[1:]]
    observations = {"observation": positions, "achieved_goal": positions, "desired_goal": goals}
    return Episode(observations, np.zeros((steps[-1], 1)), infos)


def measure(episode: Episode, maze: MazeMap | None = None) -> dict:
    return measure_walk(episode, DT, maze)


@pytest.fixture(scope="module")
def maze() -> MazeMap:
    # Cells of 2 m. The wall of the U is row 2 (x from 3 to 5 m), free at its end in column 3 (y from 5 to 7 m)
    found = MazeMap.from_env(make_env("HumanoidUMazeEval-v0"))
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
    assert measure(trajectory(*places, fall=fall))["kind"] == kind


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
    assert measure(trajectory(*places, goal=goal, fall=bool(fall)), maze)["kind"] == kind


def test_a_fall_is_only_the_first_one():
    # Not terminated when unhealthy: gets up again and walks to the goal
    heights = np.full(1001, 1.3)
    heights[200:210] = 0.9
    fallen = trajectory((0, 2.0, 2.0), (400, 8.0, 2.0), (1000, 8.0, 2.0), heights=heights)
    episode = measure(fallen)
    assert (episode["fall_step"], episode["kind"]) == (200, "falls on the way")
    assert not episode["reached"]
    assert episode["time_at_goal"] == 0
    assert episode["final_distance"] == pytest.approx(np.hypot(3.0, 1.25 - 0.9))
    # As high as no humanoid stands
    assert measure(trajectory((0, 2.0, 2.0), (3, 2.0, 2.0), heights=[1.3, 1.9, 2.1, 1.3]))["fall_step"] == 2


def test_over_a_wall_means_well_inside(maze):
    # The wall of row 2 is 2 m deep: from x = 3 to 5
    x = np.array([2.9, 3.1, 3.45, 3.55, 4.0, 4.45, 4.55, 5.1])
    over = [False, False, False, True, True, True, False, False]
    assert _goes_over_wall(np.stack([x, np.full(8, 2.0), np.full(8, 1.4)], axis=1), maze).tolist() == over
    # It is free at its end, from y = 5 on
    y = np.array([4.0, 4.45, 4.55, 6.0])
    assert _goes_over_wall(np.stack([np.full(4, 4.0), y], axis=1), maze).tolist() == [True, True, False, False]


def test_longest_stay():
    assert _longest_stay(np.array([], dtype=bool)) == 0
    assert _longest_stay(np.array([False, False])) == 0
    assert _longest_stay(np.array([True, False, True, True, True, False, True, True])) == 3


# --- Numbers of known trajectories ------------------------------------------------------------------------------------


def test_numbers_of_an_episode():
    # 3 m along x, then 4 m along y, 1 m before the goal
    heights = np.linspace(1.4, 1.2, 701)
    episode = measure(trajectory((0, 0.0, 0.0), (300, 3.0, 0.0), (700, 3.0, 4.0), goal=(3.0, 5.0), heights=heights))
    assert (episode["steps"], episode["fall_step"]) == (700, None)
    assert episode["mean_height"] == pytest.approx(1.3)
    assert episode["min_height"] == pytest.approx(1.2)
    assert episode["distance_travelled"] == pytest.approx(7.0)
    assert episode["farthest_from_start"] == pytest.approx(5.0)
    assert episode["start_distance"] == pytest.approx(np.sqrt(3**2 + 5**2 + 0.15**2))
    assert episode["final_distance"] == episode["closest_distance"] == pytest.approx(np.hypot(1.0, 0.05))
    assert (episode["reached"], episode["time_at_goal"]) == (False, 0)


def test_closest_and_final_distance_differ():
    episode = measure(trajectory((0, 0.0, 0.0), (100, 3.0, 0.0), (200, 0.0, 0.0), goal=(3.0, 0.0), fall=True))
    assert episode["fall_step"] == 200
    assert episode["closest_distance"] == pytest.approx(0.05)
    assert episode["final_distance"] == pytest.approx(np.hypot(3.0, 1.25 - 0.99))
    assert episode["reached"]
    # 0.5 m at 0.03 m a step, there and back
    assert episode["time_at_goal"] == pytest.approx(33, abs=1)
    assert episode["min_height"] == 0.99


def test_sway_is_no_way():
    # 0.02 m to and fro ten times a second
    times = np.arange(1001)
    swaying = trajectory((0, 0.0, 0.0), (1000, 0.0, 0.0))
    swaying.positions[:, 0] = 0.02 * np.sin(2 * np.pi * 10 * times * DT)
    assert np.abs(np.diff(swaying.positions[:, 0])).sum() > 10
    assert measure(swaying)["distance_travelled"] < 1


def test_report_of_known_gaits(tmp_path, monkeypatch):
    walking = trajectory((0, 2.0, 2.0), (400, 8.0, 2.0), (1000, 8.0, 2.0))
    thrown = trajectory((0, 2.0, 2.0), (100, 6.1, 2.0), fall=True)
    known = {4: [thrown, thrown, thrown, walking], 64: [walking] * 4}
    study = WalkStudy(env="HumanoidGoal-v0", depths=(4, 64), runs=tmp_path, **TOY)
    write_all(study)

    def load_known(run, runs):
        model = DeepCRL.__new__(DeepCRL)
        model.num_timesteps, model.depth = 1000 * (run.seed + 1), run.hyperparams["depth"]
        return model

    monkeypatch.setattr("sb3_deepcrl.analysis.study.load_model", load_known)
    walks = {depth: [{**measure(episode), "dt": DT} for episode in episodes] for depth, episodes in known.items()}
    monkeypatch.setattr("sb3_deepcrl.analysis.walk.walk_episodes", lambda model, *args: walks[model.depth])
    report = study.run()
    check_files(report)
    assert dict(zip(CLASSES, _shares(walks[4]), strict=True)) == {
        **dict.fromkeys(CLASSES, 0.0),
        "walks": 0.25,
        "falls at the goal": 0.75,
    }
    table = {row[""]: (row["depth 4"], row["depth 64"]) for row in report.table}
    assert [estimate.mean for estimate in table["walks"]] == [0.25, 1.0]
    assert [estimate.mean for estimate in table["falls at the goal"]] == [0.75, 0.0]
    assert table["fall after (s)"] == ("1.5", "-")
    assert table["reached the goal"] == ("0.25", "1.00")
    assert table["mean height (m)"] == ("1.30", "1.30")
    assert table["distance travelled (m)"] == ("4.10", "6.00")
    assert [(row["depth"], row["seed"], row["timesteps"], row["episode"]) for row in report.rows] == [
        (depth, seed, timesteps, episode)
        for depth in (4, 64)
        for seed, timesteps in enumerate((1000, 2000))
        for episode in range(4)
    ]
    assert [row["fall_step"] for row in report.rows[:4]] == [100, 100, 100, None]
    upright, bars = report.figure.axes
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


def test_recorded_episodes_are_those_of_the_env():
    env_kwargs = {"max_episode_steps": 200}
    recorded = record_episodes(Still(), make_envs("HumanoidUMaze-v0", 3, env_kwargs, seed=7))
    assert len(recorded) == 3
    for index, found in enumerate(recorded):
        env = gym.make("HumanoidUMaze-v0", max_episode_steps=200)
        observation, _ = env.reset(seed=7 + index)
        observations, done = [observation], False
        while not done:
            observation, _, terminated, truncated, info = env.step(np.zeros(17, dtype=np.float32))
            observations.append(observation)
            done = terminated or truncated
        for key, values in found.observations.items():
            np.testing.assert_array_equal(values, [observation[key] for observation in observations])
        assert measure(found)["fall_step"] == len(found.actions) == len(observations) - 1
        assert terminated
        assert not info["is_healthy"]


@pytest.mark.parametrize("env_id, dt", [("HumanoidGoal-v0", 0.03), ("HumanoidU4MazeEval-v0", 0.015)])
def test_episodes_of_an_existing_model(tmp_path, env_id, dt):
    model = DeepCRL("MultiInputPolicy", env_id, depth=4, width=8, buffer_size=2000)
    # Time for a fall, and none
    fallen = walk_episodes(model, env_id, 2, {"max_episode_steps": 300})
    assert {episode["kind"] for episode in fallen} <= {"falls on the way", "falls at the goal"}
    assert all(episode["fall_step"] == episode["steps"] < 300 and episode["min_height"] < 1 for episode in fallen)
    standing = walk_episodes(model, env_id, 2, {"max_episode_steps": 3})
    assert [(episode["kind"], episode["steps"], episode["fall_step"]) for episode in standing] == [("stands", 3, None)] * 2
    assert standing[0]["dt"] == pytest.approx(dt)
    (lying,) = walk_episodes(model, env_id, 1, {"max_episode_steps": 300, "terminate_when_unhealthy": False})
    assert lying["steps"] == 300 and lying["fall_step"] is not None


def test_ants_move_too():
    model = DeepCRL("MultiInputPolicy", "AntUMaze-v0", depth=4, width=8, buffer_size=2000)
    (episode,) = walk_episodes(model, "AntUMaze-v0", 1, {"max_episode_steps": 40})
    assert episode["kind"] == "stands" and 0.2 < episode["min_height"] <= episode["mean_height"] < 1.0
    (played,) = play_episodes(model, "AntUMaze-v0", 1, {"max_episode_steps": 40})
    distances = np.linalg.norm(played.positions - played.positions[0], axis=1)
    assert episode["farthest_from_start"] == pytest.approx(distances.max(), rel=1e-5)


def test_wrong_input():
    WalkStudy(env="sb3_deepcrl:AntUMaze-v0")
    message = "'PointUMaze-v0' is no env of either: use for instance HumanoidGoal-v0 or AntUMaze-v0"
    for kwargs in (dict(env="PointUMaze-v0"), dict(eval_env="PointUMaze-v0")):
        with pytest.raises(ValueError, match=message):
            WalkStudy(**kwargs)
    with pytest.raises(ValueError, match=message):
        walk_episodes(Still(), "PointUMaze-v0")
