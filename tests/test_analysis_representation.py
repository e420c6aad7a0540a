import csv

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis.cli import main
from sb3_deepcrl.analysis.representation import (
    Episode,
    RepresentationStudy,
    WayToGoal,
    choose_way,
    embed,
    path_measures,
    principal_plane,
    record_ways,
    remaining_way,
)
from sb3_deepcrl.analysis.runs import EVAL_SEED, make_env
from tests.envs import GoalReachEnv
from tests.test_analysis_stitching import MazePolicy
from tests.test_analysis_value_study import TOY, maze_of
from tests.test_deepcrl import make_model


def embedded(points: np.ndarray, dim: int = 8) -> np.ndarray:
    """Points in a rotated and shifted plane of a space with more dimensions."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))
    return points @ basis[: points.shape[1]] + 3.0


def trajectory_of(positions, goal=(0.0, 0.0), is_success=True) -> WayToGoal:
    positions = np.asarray(positions, dtype=np.float64)
    observations = {"achieved_goal": positions, "desired_goal": np.tile(goal, (len(positions), 1))}
    return WayToGoal(observations, np.zeros((len(positions), 2)), is_success)


def test_plane_of_a_plane():
    flat = np.random.default_rng(1).normal(size=(30, 2)) * [3.0, 1.0]
    points = embedded(np.vstack([flat, [5.0, 5.0]]))
    path = principal_plane(points[:-1], points[-1])
    assert path.explained_variance == pytest.approx(1)
    # Nothing is distorted, and the goal is where it belongs
    for i in (0, 7):
        expected = np.linalg.norm(flat - flat[i], axis=1)
        np.testing.assert_allclose(np.linalg.norm(path.points - path.points[i], axis=1), expected)
        assert np.linalg.norm(path.goal - path.points[i]) == pytest.approx(np.linalg.norm([5.0, 5.0] - flat[i]))
    assert path.points[:, 0].var() > path.points[:, 1].var()


def test_explained_variance():
    line = embedded(np.arange(10.0)[:, None])
    assert principal_plane(line, line[0]).explained_variance == pytest.approx(1)
    # The same variance in each of four directions
    corners = np.vstack([np.eye(4), -np.eye(4)])
    assert principal_plane(corners, corners[0]).explained_variance == pytest.approx(0.5)
    assert np.isnan(principal_plane(np.ones((5, 3)), np.ones(3)).explained_variance)


def test_measures_of_a_line():
    n = 101
    remaining = np.arange(n)[::-1] / 10
    found = path_measures(embedded(remaining[:, None] * 2), remaining * 2, remaining)
    # Of evenly spaced points
    spread = 0.2 * np.sqrt((np.array([n, 26]) ** 2 - 1) / 12)
    assert found == pytest.approx(
        {
            "explained_variance": 1,
            "order": 1,
            "straightness": 1,
            "spread": spread[0],
            "spread_near_goal": spread[1],
        }
    )


def test_measures_of_other_paths():
    angles = np.linspace(0, np.pi, 1001)
    circle = embedded(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    found = path_measures(circle, angles, angles)
    assert found["straightness"] == pytest.approx(2 / np.pi, abs=1e-5)
    assert found["order"] == pytest.approx(1)
    # Away from the goal, and back to where it began
    back_and_forth = np.array([[0.0], [1.0], [2.0], [1.0], [0.0]])
    found = path_measures(back_and_forth, np.arange(5), np.arange(5)[::-1])
    assert (found["order"], found["straightness"]) == (pytest.approx(-1), 0)
    # Steps inside of walls, from which no way leads, have no part in the order
    found = path_measures(back_and_forth, np.array([4, 3, 9, 1, 0]), np.array([4, 3, np.inf, 1, 0]))
    assert found["order"] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 3 points, got 2"):
        path_measures(np.zeros((2, 3)), np.zeros(2), np.zeros(2))


def test_ways_that_remain():
    maze = maze_of("u")
    trajectory = trajectory_of([[2, 2], [4, 6], [6, 4]], goal=[6, 2])
    np.testing.assert_allclose(remaining_way(trajectory, None), [4, np.hypot(2, 4), 2])
    ways = remaining_way(trajectory, maze)
    assert ways[0] == pytest.approx(2 + 2 * np.hypot(1, 3))
    assert ways[2] == pytest.approx(2)


def test_choice_of_the_episode():
    short = trajectory_of([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    long = trajectory_of([[9.0, 0.0], [5.0, 0.0], [1.0, 0.0]])
    instant = trajectory_of([[0.1, 0.0]])
    near = trajectory_of([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.5, 0.0], [7.0, 0.0]], is_success=False)
    far = trajectory_of([[99.0, 0.0], [98.0, 0.0], [97.0, 0.0]], is_success=False)
    assert choose_way([instant, far, short, long, near], None) is long
    nearest = choose_way([far, instant, near], None)
    assert nearest.positions[:, 0].tolist() == [4.0, 3.0, 2.0, 0.5]
    assert not nearest.is_success
    with pytest.raises(ValueError, match="All 2 episodes have less than 3 steps"):
        choose_way([instant, instant], None)


def test_recorded_states_and_actions_belong_together():
    env = make_vec_env(GoalReachEnv, 6, env_kwargs=dict(action_scale=2.0), seed=3)
    trajectories = record_ways(make_model(env), env)
    assert {trajectory.is_success for trajectory in trajectories} == {True, False}
    for trajectory in trajectories:
        # What the env does with actions in [-1, 1]
        moved = trajectory.positions + 0.3 * trajectory.actions
        np.testing.assert_allclose(trajectory.positions[1:], moved[:-1], atol=1e-5)
        distances = np.linalg.norm(moved - trajectory.goal, axis=1)
        assert (distances[:-1] >= 0.5).all()
        assert (distances[-1] < 0.5) == trajectory.is_success
        assert trajectory.is_success or len(trajectory.actions) == 10


def test_recorded_in_native_envs():
    env = make_env("PointUMazeEval-v0", 3, 0, dict(max_episode_steps=15))
    for trajectory in record_ways(make_model(env), env):
        assert len(trajectory.actions) == 15
        # A step is 0.1 s, at up to 4 m/s
        observations = trajectory.observations["observation"]
        moved = np.abs(np.diff(observations[:, :2], axis=0))
        assert (moved <= 0.1 * 4).all()
        assert (moved > 0).any()
        assert (trajectory.positions == observations[:, :2]).all()
        assert len({tuple(goal) for goal in trajectory.observations["desired_goal"]}) == 1


@pytest.mark.parametrize("energy", ["norm", "cosine"])
@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_are_those_of_the_critic(normalize, energy):
    env = DummyVecEnv([GoalReachEnv])
    model = make_model(VecNormalize(env) if normalize else env, energy=energy).learn(60)
    trajectory = record_ways(make_model(env), env)[0]
    embeddings, goal, energies = embed(model, trajectory)
    assert (embeddings.shape, goal.shape) == ((len(trajectory.actions), 8), (8,))
    observations = trajectory.observations
    if normalize:
        observations = model.get_vec_normalize_env().normalize_obs(observations)
    with th.no_grad():
        expected = model.critic(model.policy.obs_to_tensor(observations)[0], th.as_tensor(trajectory.actions))
    np.testing.assert_allclose(energies, expected[:, 0], rtol=1e-4)
    if energy == "norm":
        np.testing.assert_allclose(energies, -np.linalg.norm(embeddings - goal, axis=1), rtol=1e-4)


def run_toy(tmp_path, env_id="PointUMaze-v0", steps="100") -> tuple[list[dict[str, str]], str]:
    options = ["--n-eval-episodes", "8", "--env-kwargs", f"max_episode_steps:{steps}"]
    main(["representation", "--env", env_id, *TOY, *options, "--runs", str(tmp_path)])
    with (tmp_path / f"representation-{env_id}.csv").open() as file:
        return list(csv.DictReader(file)), (tmp_path / f"representation-{env_id}.md").read_text()


def drive(monkeypatch, way: str) -> None:
    policy = MazePolicy("u", way)
    monkeypatch.setattr(DeepCRL, "predict", lambda self, *args, **kwargs: policy.predict(*args, **kwargs))


def test_toy_study_with_success(tmp_path, monkeypatch):
    drive(monkeypatch, "maze")
    rows, text = run_toy(tmp_path)
    assert [(row["depth"], row["seed"]) for row in rows] == [("4", "0"), ("4", "1"), ("8", "0"), ("8", "1")]
    # The same episode for both depths, of the deeper model
    episodes = {(row["episode_env"], row["episode_of_depth"], row["success"]) for row in rows}
    assert episodes == {("PointUMazeEval-v0", "8", "True")}
    assert rows[0]["steps"] == rows[2]["steps"]
    for row in rows:
        assert 0 < float(row["explained_variance"]) <= 1
        assert -1 <= float(row["order"]) <= 1
        assert 0 <= float(row["straightness"]) <= 1
        assert 0 < float(row["spread_near_goal"]) < 2 * float(row["spread"])
    # To the farthest of the goals that were drawn
    env = make_env("PointUMazeEval-v0", 8, EVAL_SEED)
    x, y = max(
        env.reset()["desired_goal"].tolist(), key=lambda goal: remaining_way(trajectory_of([[2, 2]], goal), maze_of("u"))
    )
    assert "Seed 1: an episode of depth 8 in PointUMazeEval-v0 from (2." in text
    assert text.count(f"to ({x}, {y}), {rows[0]['steps']} steps to the goal.") == 2
    assert (tmp_path / "representation-PointUMaze-v0.png").stat().st_size > 10_000


def test_goals_of_training_where_no_other_is_reached(tmp_path, monkeypatch):
    drive(monkeypatch, "straight")
    # Enough for the next cells
    rows, _ = run_toy(tmp_path, steps="35")
    assert {(row["episode_env"], row["success"]) for row in rows} == {("PointUMaze-v0", "True")}


@pytest.mark.parametrize("env_id", ["PointUMaze-v0", "AntGoal-v0"])
def test_toy_study_without_success(tmp_path, env_id):
    rows, text = run_toy(tmp_path, env_id, steps="5")
    assert {row["success"] for row in rows} == {"False"}
    assert {row["spread_near_goal"] for row in rows} == {"nan"}
    assert "It does **not** reach its goal: no model with this seed reached one in 8 episodes." in text
    way = "shortest way through the maze" if "Maze" in env_id else "straight line to the goal"
    assert f"The way that remains is the {way}." in text


def test_pictures(tmp_path):
    study = RepresentationStudy(depths=[4, 8])
    trajectory = trajectory_of([[2, 2], [2, 6], [6, 6]], goal=[6, 2])
    points = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    path = principal_plane(points, points[-1])
    episode = Episode("PointUMazeEval-v0", 8, trajectory, maze_of("u"))
    figure = study._figure({4: (path, np.arange(3)), 8: (path, np.arange(3))}, episode)
    maze_ax, first, _, last = figure.axes[:4]
    # y runs to the right, x down
    assert maze_ax.collections[0].get_offsets().tolist() == [[2, 2], [6, 2], [6, 6]]
    assert maze_ax.get_ylim()[0] > maze_ax.get_ylim()[1]
    assert first.get_title() == "depth 4: 100% of the variance"
    assert [line.get_label() for line in last.lines] == ["depth 4", "depth 8"]
    # All colors are the same way
    np.testing.assert_allclose(first.collections[0].get_array(), remaining_way(trajectory, maze_of("u")))
