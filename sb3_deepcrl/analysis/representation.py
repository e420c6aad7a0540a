"""
How the critic represents the way to a goal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from matplotlib.figure import Figure

from sb3_deepcrl.analysis.episodes import Episode, make_env, play_episodes
from sb3_deepcrl.analysis.mazes import MazeMap
from sb3_deepcrl.analysis.report import STAR, Report, Results, depth_colors, depth_table, new_figure, scores_by_depth
from sb3_deepcrl.analysis.statistics import rank_correlation
from sb3_deepcrl.analysis.study import ComparisonOfDepths, load_model
from sb3_deepcrl.analysis.value_map import network_inputs
from sb3_deepcrl.common.datasets import scale_actions
from sb3_deepcrl.common.losses import rowwise_energy
from sb3_deepcrl.deepcrl import DeepCRL

# A shorter way has no shape
MIN_STEPS = 3
# What is measured, and what it means
MEASURES = {
    "explained_variance": "the part of the variance of the embeddings that lies in the plane of their first two principal "
    "components; 1 means that the path is flat, and the picture shows all of it",
    "order": "Spearman's rank correlation of the distance between embedding and embedding of the goal (minus the energy) with "
    "the way that remains; 1 means that the embedding comes nearer to the goal's whenever the robot does",
    "straightness": "distance between the ends of the path of embeddings, divided by the length of the path; 1 for a straight "
    "line, small for one that winds or goes back and forth",
    "spread": "root mean square distance of the embeddings from their mean, in units of the critic's energy",
    "spread_near_goal": "the same for the last quarter of the way alone, where those of shallow networks crowd in the paper",
}


class _PlanePath(NamedTuple):
    """A path ``(n_steps, 2)`` and its goal in the plane of its first two principal components."""

    points: np.ndarray
    goal: np.ndarray
    explained_variance: float


def _principal_plane(points: np.ndarray, goal: np.ndarray) -> _PlanePath:
    """Points ``(n_steps, dim)`` and one point more in the plane in which the points vary most."""
    points, goal = np.asarray(points, dtype=np.float64), np.asarray(goal, dtype=np.float64)
    center = points.mean(axis=0)
    _, singular_values, directions = np.linalg.svd(points - center, full_matrices=False)
    variances = singular_values**2
    total = variances.sum()
    explained = float(variances[:2].sum() / total) if total > 0 else float("nan")
    return _PlanePath((points - center) @ directions[:2].T, (goal - center) @ directions[:2].T, explained)


def _path_measures(points: np.ndarray, to_goal: np.ndarray, remaining: np.ndarray) -> dict[str, float]:
    """The numbers of ``MEASURES``, without the steps from which no way leads to the goal (infinite ``remaining``)."""
    points = np.asarray(points, dtype=np.float64)
    has_way = np.isfinite(remaining)
    length = np.linalg.norm(np.diff(points, axis=0), axis=1).sum()

    def spread(part: np.ndarray) -> float:
        return float(np.sqrt(((part - part.mean(axis=0)) ** 2).sum(axis=1).mean())) if len(part) else float("nan")

    first = remaining[has_way][0] if has_way.any() else np.nan
    return {
        "explained_variance": _principal_plane(points, points[-1]).explained_variance,
        "order": rank_correlation(to_goal[has_way], remaining[has_way]),
        "straightness": float(np.linalg.norm(points[-1] - points[0]) / length) if length > 0 else float("nan"),
        "spread": spread(points),
        "spread_near_goal": spread(points[has_way & (remaining <= first / 4)]),
    }


def _embed(model: DeepCRL, way: Episode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of states and actions, ``(n_steps, repr_dim)``, and of the goal, and energies of both, ``(n_steps,)``."""
    obs_tensor = network_inputs(model, {key: values[:-1] for key, values in way.observations.items()})
    with th.no_grad():
        scaled = scale_actions(way.actions, model.action_space)
        actions = th.as_tensor(scaled, dtype=th.float32, device=model.device)
        embeddings = model.critic.encode_state_action(model.critic.extract_state_features(obs_tensor), actions)
        goals = model.critic.encode_goal(obs_tensor)
        energies = rowwise_energy(embeddings, goals, model.critic.energy)
    return embeddings.float().cpu().numpy(), goals[0].float().cpu().numpy(), energies.float().cpu().numpy()


def _remaining_way(way: Episode, maze: MazeMap | None) -> np.ndarray:
    """Length of the shortest way to the goal before each step in meters, infinite inside of walls."""
    positions, goal = way.positions[:-1], way.goals[0]
    if maze is None:
        return np.linalg.norm(positions - goal, axis=-1)
    return maze.distances(positions[:, :2], goal[None, :2])[:, 0]


def _choose_way(episodes: Sequence[Episode], maze: MazeMap | None) -> Episode:
    """
    The successful episode with the longest way from start to goal, up to there; if there is none, the one that came nearest
    to its goal, up to there.
    """
    ways = [way.head(int(way.successes.argmax()) + 1) if way.successes.any() else way for way in episodes]
    ways = [way for way in ways if len(way.actions) >= MIN_STEPS]
    if not ways:
        raise ValueError(f"All {len(episodes)} episodes have less than {MIN_STEPS} steps: there is no way to look at")
    if successful := [way for way in ways if way.successes.any()]:
        return max(successful, key=lambda way: _remaining_way(way, maze)[0])
    nearest = min(ways, key=lambda way: _remaining_way(way, maze).min())
    return nearest.head(max(int(_remaining_way(nearest, maze).argmin()) + 1, MIN_STEPS))


class _Choice(NamedTuple):
    """The way that is looked at, where and by which depth it was played."""

    env_id: str
    depth: int
    way: Episode
    maze: MazeMap | None


@dataclass(kw_only=True)
class RepresentationStudy(ComparisonOfDepths):
    """
    Embeddings on the way to a goal (figure 10).

    The critic's embeddings of the states and actions of one successful episode, the same for models of several depths:
    pictures of their first two principal components, and their shape in numbers.

    The episode is one of the deepest model with the same seed. If that reaches no goal, it is one of the next deepest one; if
    no model does, one with the goals of training. If that does not help either, it is the deepest model's episode that came
    nearest to its goal, and the report says so.
    """

    name: ClassVar[str] = "representation"
    looks_into_models: ClassVar[bool] = True

    def _choose(self, seed: int) -> _Choice:
        found: list[_Choice] = []
        for env_id in dict.fromkeys((self.eval_env, self.env)):
            maze = MazeMap.find(make_env(env_id, self.all_eval_env_kwargs))
            for depth in sorted(self.depths, reverse=True):
                model = load_model(self.seeds_of(self.make_run(depth=depth))[seed], self.runs)
                episodes = play_episodes(model, env_id, self.n_eval_episodes, self.all_eval_env_kwargs)
                found.append(_Choice(env_id, depth, _choose_way(episodes, maze), maze))
                if found[-1].way.successes.any():
                    return found[-1]
        return found[0]

    def report(self, results: Results) -> Report:
        choices = {seed: self._choose(seed) for seed in range(self.seeds)}
        paths: dict[int, tuple[_PlanePath, np.ndarray]] = {}

        def measure(depth: int, seed: int, model: DeepCRL) -> Iterator[dict[str, Any]]:
            env_id, depth_of_episode, way, maze = choices[seed]
            embeddings, goal, energies = _embed(model, way)
            paths.setdefault(depth, (_principal_plane(embeddings, goal), -energies))
            yield {
                "episode_env": env_id,
                "episode_of_depth": depth_of_episode,
                "success": bool(way.successes.any()),
                "steps": len(way.actions),
                **_path_measures(embeddings, -energies, _remaining_way(way, maze)),
            }

        rows = self.measure_models(measure)
        table = depth_table({name.replace("_", " "): scores_by_depth(rows, name) for name in MEASURES})
        way = "straight line to the goal" if choices[0].maze is None else "shortest way through the maze"
        notes = [
            f"Embeddings of states and actions by critics trained on {self.env}, along one episode for each seed, the same "
            f"for all depths. {self.averaging()}. The way that remains is the {way}.",
            *(f"- {name.replace('_', ' ')}: {meaning}." for name, meaning in MEASURES.items()),
            *(self._describe(seed, choice) for seed, choice in choices.items()),
            "The picture shows seed 0. Colors are the way that remains, the star is the goal.",
        ]
        return Report(f"Representation of a way on {self.env}", rows, table, notes, self._figure(paths, choices[0]))

    def _describe(self, seed: int, choice: _Choice) -> str:
        way = choice.way
        start, goal = (", ".join(f"{x:.1f}" for x in place) for place in (way.positions[0], way.goals[0]))
        failure = (
            "up to where it came nearest. It does **not** reach its goal: no model with this seed reached one in "
            f"{self.n_eval_episodes} episodes."
        )
        return (
            f"Seed {seed}: an episode of depth {choice.depth} in {choice.env_id} from ({start}) to ({goal}), "
            f"{len(way.actions)} steps {'to the goal.' if way.successes.any() else failure}"
        )

    def _figure(self, paths: dict[int, tuple[_PlanePath, np.ndarray]], choice: _Choice) -> Figure:
        way, maze = choice.way, choice.maze
        figure, axes = new_figure(1, len(paths) + 2, width=4.2, height=4.2)
        remaining = _remaining_way(way, maze)
        style: dict[str, Any] = dict(c=remaining, cmap="viridis_r", s=14, zorder=2)
        star: dict[str, Any] = {**STAR, "markersize": 16}
        ax = axes[0, 0]
        ax.set(title="way of the robot", xlabel="x (m)", ylabel="y (m)", aspect="equal")
        positions, goal = way.positions[:-1, :2], way.goals[0, :2]
        if maze is not None:
            maze.draw(ax)
            positions, goal = maze.to_picture(positions), maze.to_picture(goal)
        ax.scatter(*positions.T, **style)
        ax.plot(*goal, **star)
        for ax, (depth, (path, _)) in zip(axes[0, 1:], paths.items(), strict=False):
            ax.plot(*path.points.T, color="0.7", linewidth=0.8, zorder=1)
            points = ax.scatter(*path.points.T, **style)
            ax.plot(*path.goal, **star)
            title = f"depth {depth}: {path.explained_variance:.0%} of the variance"
            ax.set(title=title, xlabel="first component", ylabel="second component")
            # One unit is the same in both directions
            ax.set_aspect("equal", adjustable="datalim")
        figure.colorbar(points, ax=axes[0, len(paths)], label="way that remains (m)", shrink=0.85)
        ax = axes[0, -1]
        colors = depth_colors(list(paths))
        for depth, (_, to_goal) in paths.items():
            ax.plot(remaining, to_goal, ".", markersize=4, color=colors[depth], label=f"depth {depth}")
        ax.set(xlabel="way that remains (m)", ylabel="distance to the goal's embedding")
        ax.invert_xaxis()
        ax.legend()
        figure.suptitle(f"{choice.env_id.removesuffix('-v0')}: one episode and its embeddings")
        return figure
