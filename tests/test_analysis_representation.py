import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import RepresentationStudy
from sb3_deepcrl.analysis.episodes import Episode, make_envs, record_episodes
from sb3_deepcrl.analysis.representation import (
    _choose_way,
    _embed,
    _path_measures,
    _principal_plane,
    _remaining_way,
)
from tests.envs import GoalReachEnv
from tests.studies import TOY, check_files, write_all
from tests.test_analysis_stitching import MazePolicy
from tests.test_deepcrl import make_model
from tests.test_value_map import maze_of


def embedded(points: np.ndarray, dim: int = 8) -> np.ndarray:
    """Points in a rotated and shifted plane of a space with more dimensions."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))
    return points @ basis[: points.shape[1]] + 3.0


def trajectory_of(positions, goal=(0.0, 0.0), is_success=True) -> Episode:
    n = len(positions)
    # It is at the goal, or not, after the last step
    positions = np.array([*positions, goal], dtype=np.float64)
    observations = {"achieved_goal": positions, "desired_goal": np.tile(goal, (n + 1, 1))}
    return Episode(observations, np.zeros((n, 2)), [{"is_success": is_success and i == n - 1} for i in range(n)])


def test_plane_of_a_plane():
    flat = np.random.default_rng(1).normal(size=(30, 2)) * [3.0, 1.0]
    points = embedded(np.vstack([flat, [5.0, 5.0]]))
    path = _principal_plane(points[:-1], points[-1])
    assert path.explained_variance == pytest.approx(1)
    # Nothing is distorted, and the goal is where it belongs
    for i in (0, 7):
        expected = np.linalg.norm(flat - flat[i], axis=1)
        np.testing.assert_allclose(np.linalg.norm(path.points - path.points[i], axis=1), expected)
        assert np.linalg.norm(path.goal - path.points[i]) == pytest.approx(np.linalg.norm([5.0, 5.0] - flat[i]))
    assert path.points[:, 0].var() > path.points[:, 1].var()


def test_explained_variance():
    line = embedded(np.arange(10.0)[:, None])
    assert _principal_plane(line, line[0]).explained_variance == pytest.approx(1)
    # The same variance in each of four directions
    corners = np.vstack([np.eye(4), -np.eye(4)])
    assert _principal_plane(corners, corners[0]).explained_variance == pytest.approx(0.5)
    assert np.isnan(_principal_plane(np.ones((5, 3)), np.ones(3)).explained_variance)


def test_measures_of_a_line():
    n = 101
    remaining = np.arange(n)[::-1] / 10
    found = _path_measures(embedded(remaining[:, None] * 2), remaining * 2, remaining)
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
    found = _path_measures(circle, angles, angles)
    assert found["straightness"] == pytest.approx(2 / np.pi, abs=1e-5)
    assert found["order"] == pytest.approx(1)
    # Away from the goal, and back to where it began
    back_and_forth = np.array([[0.0], [1.0], [2.0], [1.0], [0.0]])
    found = _path_measures(back_and_forth, np.arange(5), np.arange(5)[::-1])
    assert (found["order"], found["straightness"]) == (pytest.approx(-1), 0)
    # Steps inside of walls, from which no way leads, have no part in the order
    found = _path_measures(back_and_forth, np.array([4, 3, 9, 1, 0]), np.array([4, 3, np.inf, 1, 0]))
    assert found["order"] == pytest.approx(1)


def test_ways_that_remain():
    maze = maze_of("u")
    trajectory = trajectory_of([[2, 2], [4, 6], [6, 4]], goal=[6, 2])
    np.testing.assert_allclose(_remaining_way(trajectory, None), [4, np.hypot(2, 4), 2])
    ways = _remaining_way(trajectory, maze)
    assert ways[0] == pytest.approx(2 + 2 * np.hypot(1, 3))
    assert ways[2] == pytest.approx(2)


def test_choice_of_the_episode():
    short = trajectory_of([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    long = trajectory_of([[9.0, 0.0], [5.0, 0.0], [1.0, 0.0]])
    instant = trajectory_of([[0.1, 0.0]])
    near = trajectory_of([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.5, 0.0], [7.0, 0.0]], is_success=False)
    far = trajectory_of([[99.0, 0.0], [98.0, 0.0], [97.0, 0.0]], is_success=False)
    assert _choose_way([instant, far, short, long, near], None).positions.tolist() == long.positions.tolist()
    nearest = _choose_way([far, instant, near], None)
    assert nearest.positions[:-1, 0].tolist() == [4.0, 3.0, 2.0, 0.5]
    assert not nearest.successes.any()
    with pytest.raises(ValueError, match="All 2 episodes have less than 3 steps"):
        _choose_way([instant, instant], None)


def test_recorded_states_and_actions_belong_together():
    env = make_vec_env(GoalReachEnv, 6, env_kwargs=dict(action_scale=2.0), seed=3)
    for episode in record_episodes(make_model(env), env):
        assert len(episode.actions) == 10
        np.testing.assert_allclose(episode.positions[1:], episode.positions[:-1] + 0.3 * episode.actions / 2.0, atol=1e-5)
        distances = np.linalg.norm(episode.positions - episode.goals, axis=1)
        assert (episode.successes == (distances[1:] < 0.5)).all()


@pytest.mark.parametrize("energy", ["norm", "cosine"])
@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_are_those_of_the_critic(normalize, energy):
    env = DummyVecEnv([GoalReachEnv])
    model = make_model(VecNormalize(env) if normalize else env, policy_kwargs=dict(repr_dim=8, energy=energy)).learn(60)
    trajectory = record_episodes(make_model(env), env)[0]
    embeddings, goal, energies = _embed(model, trajectory)
    assert (embeddings.shape, goal.shape) == ((len(trajectory.actions), 8), (8,))
    observations = {key: values[:-1] for key, values in trajectory.observations.items()}
    if normalize:
        observations = model.get_vec_normalize_env().normalize_obs(observations)
    with th.no_grad():
        expected = model.critic(model.policy.obs_to_tensor(observations)[0], th.as_tensor(trajectory.actions))
    np.testing.assert_allclose(energies, expected[:, 0], rtol=1e-4)
    if energy == "norm":
        np.testing.assert_allclose(energies, -np.linalg.norm(embeddings - goal, axis=1), rtol=1e-4)


def study_of(tmp_path, env_id: str = "PointUMaze-v0", steps: int = 100) -> RepresentationStudy:
    options = {**TOY, "n_eval_episodes": 8, "env_kwargs": {"max_episode_steps": steps}}
    study = RepresentationStudy(env=env_id, depths=(4, 8), runs=tmp_path, **options)
    models = {depth: DeepCRL("MultiInputPolicy", env_id, depth=depth, width=8, buffer_size=2000) for depth in (4, 8)}
    write_all(study, depth_4=models[4], depth_8=models[8])
    return study


def drive(monkeypatch, way: str) -> None:
    policy = MazePolicy("u", way)
    monkeypatch.setattr(DeepCRL, "predict", lambda self, *args, **kwargs: policy.predict(*args, **kwargs))


def test_study_with_success(tmp_path, monkeypatch):
    drive(monkeypatch, "maze")
    report = study_of(tmp_path).run()
    text = check_files(report)
    assert [(row["depth"], row["seed"]) for row in report.rows] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    # The same episode for both depths, of the deeper model
    episodes = {(row["episode_env"], row["episode_of_depth"], row["success"]) for row in report.rows}
    assert episodes == {("PointUMazeEval-v0", 8, True)}
    assert report.rows[0]["steps"] == report.rows[2]["steps"]
    for row in report.rows:
        assert 0 < row["explained_variance"] <= 1 and -1 <= row["order"] <= 1 and 0 <= row["straightness"] <= 1
        assert 0 < row["spread_near_goal"] < 2 * row["spread"]
    # To the farthest of the goals that were drawn
    goals = make_envs("PointUMazeEval-v0", 8).reset()["desired_goal"].tolist()
    x, y = max(goals, key=lambda goal: _remaining_way(trajectory_of([[2, 2]], goal), maze_of("u")))
    assert "Seed 1: an episode of depth 8 in PointUMazeEval-v0 from (2." in text
    assert text.count(f"to ({x}, {y}), {report.rows[0]['steps']} steps to the goal.") == 2
    maze_ax, first = report.figure.axes[:2]
    # y runs to the right, x down, and all colors are the same way
    assert maze_ax.get_ylim()[0] > maze_ax.get_ylim()[1]
    np.testing.assert_allclose(first.collections[0].get_array(), maze_ax.collections[0].get_array())
    assert first.get_title().startswith("depth 4: ")


def test_goals_of_training_where_no_other_is_reached(tmp_path, monkeypatch):
    drive(monkeypatch, "straight")
    # Enough for the next cells
    report = study_of(tmp_path, steps=35).run()
    assert {(row["episode_env"], row["success"]) for row in report.rows} == {("PointUMaze-v0", True)}


@pytest.mark.parametrize("env_id", ["PointUMaze-v0", "AntGoal-v0", "BitFlipping-v0"])
def test_study_without_success(tmp_path, env_id):
    report = study_of(tmp_path, env_id, steps=5).run()
    assert {row["success"] for row in report.rows} == {False}
    text = check_files(report)
    assert "It does **not** reach its goal: no model with this seed reached one in 8 episodes." in text
    way = "shortest way through the maze" if "Maze" in env_id else "straight line to the goal"
    assert f"The way that remains is the {way}." in text
