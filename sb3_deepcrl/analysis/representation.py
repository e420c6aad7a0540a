"""
How the critic represents the way to a goal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_deepcrl.analysis.runs import EVAL_SEED, load_model, make_env, make_single_env
from sb3_deepcrl.analysis.statistics import interquartile_mean, rank_correlation
from sb3_deepcrl.analysis.study import (
    ComparisonOfDepths,
    Report,
    Results,
    depth_colors,
    new_figure,
    scores_by_depth,
)
from sb3_deepcrl.analysis.value_map import MazeMap, network_inputs
from sb3_deepcrl.common.losses import rowwise_energy
from sb3_deepcrl.deepcrl import DeepCRL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


@dataclass
class WayToGoal:
    """
    The way of a robot in one episode, up to the first step at the goal.

    :param observations: Observations before each step, shape ``(n_steps, ...)`` each
    :param actions: Actions in [-1, 1], shape ``(n_steps, action_dim)``
    :param is_success: Whether the goal was reached
    """

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    is_success: bool

    @property
    def positions(self) -> np.ndarray:
        """Achieved goals, shape ``(n_steps, goal_dim)``."""
        return self.observations["achieved_goal"]

    @property
    def goal(self) -> np.ndarray:
        """The desired goal."""
        return self.observations["desired_goal"][0]


class Episode(NamedTuple):
    """
    The episode whose embeddings are looked at.

    :param env_id: Where it was played
    :param depth: Depth of the model that played it
    :param way: What happened
    :param maze: The maze, None on an open floor
    """

    env_id: str
    depth: int
    way: WayToGoal
    maze: MazeMap | None


class PlanePath(NamedTuple):
    """
    A path in the plane of its first two principal components.

    :param points: The path, shape ``(n_steps, 2)``
    :param goal: The goal in the same plane
    :param explained_variance: Part of the variance of the path that lies in the plane
    """

    points: np.ndarray
    goal: np.ndarray
    explained_variance: float


def principal_plane(points: np.ndarray, goal: np.ndarray) -> PlanePath:
    """
    :param points: Points, shape ``(n_steps, dim)``
    :param goal: One point more, shape ``(dim,)``, which has no influence on the plane
    :return: Both in the plane in which the points vary most; the explained variance is not a number if they do not vary
    """
    points, goal = np.asarray(points, dtype=np.float64), np.asarray(goal, dtype=np.float64)
    center = points.mean(axis=0)
    _, singular_values, directions = np.linalg.svd(points - center, full_matrices=False)
    variances = singular_values**2
    total = variances.sum()
    explained = float(variances[:2].sum() / total) if total > 0 else float("nan")
    return PlanePath((points - center) @ directions[:2].T, (goal - center) @ directions[:2].T, explained)


def path_measures(points: np.ndarray, to_goal: np.ndarray, remaining: np.ndarray) -> dict[str, float]:
    """
    :param points: Embeddings along a way, shape ``(n_steps, dim)``
    :param to_goal: Distance of each to the embedding of the goal, shape ``(n_steps,)``
    :param remaining: Length of the way that remains at each, shape ``(n_steps,)``; where it is infinite it is left out
    :return: The numbers of ``MEASURES``
    :raises ValueError: if there are less than three points
    """
    points = np.asarray(points, dtype=np.float64)
    if len(points) < MIN_STEPS:
        raise ValueError(f"A path needs at least {MIN_STEPS} points, got {len(points)}")
    has_way = np.isfinite(remaining)
    length = np.linalg.norm(np.diff(points, axis=0), axis=1).sum()

    def spread(part: np.ndarray) -> float:
        return float(np.sqrt(((part - part.mean(axis=0)) ** 2).sum(axis=1).mean())) if len(part) else float("nan")

    first = remaining[has_way][0] if has_way.any() else np.nan
    return {
        "explained_variance": principal_plane(points, points[-1]).explained_variance,
        "order": rank_correlation(to_goal[has_way], remaining[has_way]),
        "straightness": float(np.linalg.norm(points[-1] - points[0]) / length) if length > 0 else float("nan"),
        "spread": spread(points),
        "spread_near_goal": spread(points[has_way & (remaining <= first / 4)]),
    }


def embed(model: DeepCRL, way: WayToGoal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :param model: The trained model
    :param way: States and actions, of whichever policy
    :return: Embeddings of state and action, shape ``(n_steps, repr_dim)``, embedding of the goal, shape ``(repr_dim,)``, and
        the energy of both, shape ``(n_steps,)``
    """
    obs_tensor = network_inputs(model, way.observations)
    with th.no_grad():
        actions = th.as_tensor(way.actions, dtype=th.float32, device=model.device)
        embeddings = model.critic.encode_state_action(model.critic.extract_state_features(obs_tensor), actions)
        goals = model.critic.encode_goal(obs_tensor)
        energies = rowwise_energy(embeddings, goals, model.critic.energy)
    return embeddings.float().cpu().numpy(), goals[0].float().cpu().numpy(), energies.float().cpu().numpy()


def record_ways(model: DeepCRL, env: VecEnv) -> list[WayToGoal]:
    """
    :param model: The trained model, which acts deterministically
    :param env: Goal-conditioned envs that report ``is_success``
    :return: The first episode of each env
    """
    observations: list[dict[str, np.ndarray]] = []
    actions: list[np.ndarray] = []
    ends = np.zeros(env.num_envs, dtype=int)
    successes = np.zeros(env.num_envs, dtype=bool)
    obs = env.reset()
    while not ends.all():
        assert isinstance(obs, dict)
        action, _ = model.predict(obs, deterministic=True)
        # The env may write the next observations into the same arrays
        observations.append({key: value.copy() for key, value in obs.items()})
        actions.append(model.policy.scale_action(action))
        obs, _, dones, infos = env.step(action)
        at_goal = np.array([info["is_success"] for info in infos], dtype=bool)
        open_ones = ends == 0
        successes |= open_ones & at_goal
        ends[open_ones & (dones | at_goal)] = len(actions)
    return [
        WayToGoal(
            {key: np.stack([step[key][i] for step in observations[:end]]) for key in observations[0]},
            np.stack([step[i] for step in actions[:end]]),
            bool(successes[i]),
        )
        for i, end in enumerate(ends)
    ]


def remaining_way(way: WayToGoal, maze: MazeMap | None) -> np.ndarray:
    """
    :param way: A way to a goal
    :param maze: The maze, None on an open floor
    :return: Length of the shortest way to the goal at each step in metres, infinite inside of walls
    """
    if maze is None:
        return np.linalg.norm(way.positions - way.goal, axis=-1)
    return maze.distances(way.positions[:, :2], way.goal[None, :2])[:, 0]


def choose_way(ways: Sequence[WayToGoal], maze: MazeMap | None) -> WayToGoal:
    """
    :param ways: Episodes
    :param maze: The maze, None on an open floor
    :return: The successful one with the longest way from start to goal; if there is none, the one that came nearest to its
        goal, up to there
    :raises ValueError: if all have less than three steps
    """
    long_ones = [way for way in ways if len(way.actions) >= MIN_STEPS]
    if not long_ones:
        raise ValueError(f"All {len(ways)} episodes have less than {MIN_STEPS} steps: there is no way to look at")
    successful = [way for way in long_ones if way.is_success]
    if successful:
        return max(successful, key=lambda way: remaining_way(way, maze)[0])
    nearest = min(long_ones, key=lambda way: remaining_way(way, maze).min())
    end = max(int(remaining_way(nearest, maze).argmin()) + 1, MIN_STEPS)
    return WayToGoal({key: values[:end] for key, values in nearest.observations.items()}, nearest.actions[:end], False)


@dataclass
class RepresentationStudy(ComparisonOfDepths):
    """
    The critic's embeddings of the states and actions of one successful episode, the same for models of several depths:
    pictures of their first two principal components, and their shape in numbers (figure 10 of the paper).

    The episode is one of the deepest model with the same seed. If that reaches no goal, it is one of the next deepest one; if
    no model does, one with the goals of training. If that does not help either, it is the deepest model's episode that came
    nearest to its goal, and the report says so.
    """

    name: ClassVar[str] = "representation"
    summary: ClassVar[str] = "how the critic represents the way to a goal"

    def episode(self, seed: int, runs: Path) -> Episode:
        """
        :param seed: Seed of the models
        :param runs: Folder of all runs
        :return: The episode that is looked at
        """
        found: list[Episode] = []
        for env_id in dict.fromkeys((self.eval_env, self.env)):
            single = make_single_env(env_id, self.env_kwargs)
            maze = MazeMap.find(single)
            single.close()
            for depth in sorted(self.depths, reverse=True):
                run = self.seeds_of(self.make_run(depth=depth))[seed]
                env = make_env(env_id, self.n_eval_episodes, EVAL_SEED, self.env_kwargs)
                way = choose_way(record_ways(load_model(run, runs), env), maze)
                env.close()
                found.append(Episode(env_id, depth, way, maze))
                if way.is_success:
                    return found[-1]
        return found[0]

    def report(self, results: Results, runs: Path) -> Report:
        episodes = {seed: self.episode(seed, runs) for seed in range(self.seeds)}
        rows: list[dict[str, Any]] = []
        paths: dict[int, tuple[PlanePath, np.ndarray]] = {}
        for depth, seed, model in self.models(runs):
            episode = episodes[seed]
            embeddings, goal, energies = embed(model, episode.way)
            measures = path_measures(embeddings, -energies, remaining_way(episode.way, episode.maze))
            rows.append(
                {
                    "depth": depth,
                    "seed": seed,
                    "timesteps": model.num_timesteps,
                    "episode_env": episode.env_id,
                    "episode_of_depth": episode.depth,
                    "success": episode.way.is_success,
                    "steps": len(episode.way.actions),
                    **{name: round(value, 4) for name, value in measures.items()},
                }
            )
            paths.setdefault(depth, (principal_plane(embeddings, goal), -energies))
        scores = {name.replace("_", " "): scores_by_depth(rows, name) for name in MEASURES}
        table = []
        for depth in self.depths:
            estimates = interquartile_mean(np.stack([by_depth[depth] for by_depth in scores.values()], axis=1))
            table.append({"depth": depth, **dict(zip(scores, estimates, strict=True))})
        way = "straight line to the goal" if episodes[0].maze is None else "shortest way through the maze"
        notes = [
            f"Embeddings of states and actions by critics trained on {self.env}, along one episode for each seed, the same "
            f"for all depths. {self.averaging()}. The way "
            f"that remains is the {way}.",
            *(f"- {name.replace('_', ' ')}: {meaning}." for name, meaning in MEASURES.items()),
            *(self._episode_note(seed, episode) for seed, episode in episodes.items()),
            "The picture shows seed 0. Colors are the way that remains, the star is the goal.",
        ]
        return Report(f"Representation of a way on {self.env}", rows, table, notes, self._figure(paths, episodes[0]))

    def _episode_note(self, seed: int, episode: Episode) -> str:
        way = episode.way
        start, goal = (", ".join(f"{x:.1f}" for x in position) for position in (way.positions[0], way.goal))
        text = (
            f"Seed {seed}: an episode of depth {episode.depth} in {episode.env_id} from ({start}) to ({goal}), "
            f"{len(way.actions)} steps"
        )
        if way.is_success:
            return f"{text} to the goal."
        return (
            f"{text}. It does **not** reach its goal: no model with this seed reached one in {self.n_eval_episodes} episodes. "
            "It is the one that came nearest, up to there."
        )

    def _figure(self, paths: dict[int, tuple[PlanePath, np.ndarray]], episode: Episode) -> "Figure":
        way, maze = episode.way, episode.maze
        figure, axes = new_figure(1, len(paths) + 2, width=4.2, height=4.2)
        remaining = remaining_way(way, maze)
        style: dict[str, Any] = dict(c=remaining, cmap="viridis_r", s=14, zorder=2)
        star: dict[str, Any] = dict(marker="*", markersize=16, color="tab:red", markeredgecolor="white", linestyle="none")
        ax = axes[0, 0]
        positions, goal = way.positions[:, :2], way.goal[:2]
        if maze is None:
            ax.set(xlabel="x (m)", ylabel="y (m)", aspect="equal")
        else:
            maze.draw(ax)
            positions, goal = maze.to_picture(positions), maze.to_picture(goal)
        ax.scatter(*positions.T, **style)
        ax.plot(*goal, **star)
        ax.set_title("way of the robot")
        for ax, (depth, (path, _)) in zip(axes[0, 1:], paths.items(), strict=False):
            ax.plot(*path.points.T, color="0.7", linewidth=0.8, zorder=1)
            points = ax.scatter(*path.points.T, **style)
            ax.plot(*path.goal, **star)
            ax.set(
                title=f"depth {depth}: {path.explained_variance:.0%} of the variance",
                xlabel="first component",
                ylabel="second component",
            )
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
        figure.suptitle(f"{episode.env_id.removesuffix('-v0')}: one episode and its embeddings")
        return figure
