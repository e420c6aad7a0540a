"""
How humanoids and ants move, and how they fall.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from stable_baselines3.common.type_aliases import PolicyPredictor

from sb3_deepcrl.analysis.episodes import EVAL_SEED, Episode, make_env, play_episodes
from sb3_deepcrl.analysis.mazes import MazeMap
from sb3_deepcrl.analysis.report import Report, Results, depth_colors, new_figure
from sb3_deepcrl.analysis.statistics import interquartile_means
from sb3_deepcrl.analysis.study import ComparisonOfDepths
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs.registration import ENV_TABLE

# What may happen in an episode, from good to bad
CLASSES = ("walks", "goes over the wall", "stands", "falls at the goal", "falls on the way")
# Who goes over a wall has the torso that far inside of its outline, as a share of the side of a cell: 0.5 m for the humanoid.
# Leaning against it is less.
OVER_WALL = 0.25
# Who stayed at the goal that long, in seconds, has walked there, even with a fall later on
STAY_SECONDS = 1.5
# A fall is one at the goal up to that horizontal distance from it (the released code's easy threshold), in meters, ...
AT_GOAL = 2.0
# ... if it covered that share of the distance at the start: otherwise the robot just fell where it was
APPROACH = 0.5
# Who never was that far from the start, in meters, has not walked
STANDING_RADIUS = 0.5
# Measures in meters that the report shows
LENGTHS = ("mean_height", "min_height", "farthest_from_start", "distance_travelled", "closest_distance", "final_distance")
# Steps of the path, in seconds: shorter ones would count how the torso sways
PATH_SECONDS = 0.3


def _goes_over_wall(positions: np.ndarray, maze: MazeMap) -> np.ndarray:
    """Which positions are above a wall, at least ``OVER_WALL`` of a cell away from where there is none, along both axes."""
    shifts = OVER_WALL * maze.cell_size * np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    return np.all(maze.is_wall(positions[:, None, :2] + shifts), axis=1)


def _longest_stay(at_goal: np.ndarray) -> int:
    """Largest number of steps in a row at the goal."""
    return max(map(len, "".join("x" if reached else " " for reached in at_goal).split()), default=0)


def _classify(
    positions: np.ndarray, goals: np.ndarray, at_goal: np.ndarray, fell: bool, farthest: float, dt: float, maze: MazeMap | None
) -> str:
    """One of ``CLASSES``, by what was before a fall. The notes of the report say when each holds."""
    if maze is not None and _goes_over_wall(positions, maze).any():
        return "goes over the wall"
    if _longest_stay(at_goal) * dt >= STAY_SECONDS:
        return "walks"
    if not fell:
        return "walks" if farthest > STANDING_RADIUS or at_goal.any() else "stands"
    distances = np.linalg.norm((positions - goals)[:, :2], axis=1)
    thrown = distances[-1] <= AT_GOAL and distances[0] - distances[-1] >= APPROACH * distances[0]
    return "falls at the goal" if thrown else "falls on the way"


def measure_walk(episode: Episode, dt: float, maze: MazeMap | None = None) -> dict[str, Any]:
    """
    Describe how a robot moved in an episode of steps of ``dt`` seconds, up to its fall if there was one: ``kind``, one of
    ``CLASSES``, ``fall_step`` from 1 on, None without a fall, and other measures, lengths in meters.
    """
    healthy = np.array([info["is_healthy"] for info in episode.infos])
    fall_step = None if healthy.all() else int(np.argmin(healthy)) + 1
    upright = episode.head(fall_step or len(healthy))
    positions, goals, at_goal = upright.positions.astype(float), upright.goals.astype(float), upright.successes
    # The observations of both robots begin with the position of the torso
    heights = upright.observations["observation"][:, 2].astype(float)
    distances = np.linalg.norm(positions - goals, axis=1)
    farthest = float(np.linalg.norm((positions - positions[0])[:, :2], axis=1).max())
    stride = max(round(PATH_SECONDS / dt), 1)
    path = np.concatenate([positions[:-1:stride, :2], positions[-1:, :2]])
    return {
        "kind": _classify(positions, goals, at_goal, fall_step is not None, farthest, dt, maze),
        "steps": len(healthy),
        "fall_step": fall_step,
        "mean_height": float(heights.mean()),
        "min_height": float(heights.min()),
        "farthest_from_start": farthest,
        "distance_travelled": float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum()),
        "start_distance": float(distances[0]),
        "closest_distance": float(distances.min()),
        "final_distance": float(distances[-1]),
        "reached": bool(at_goal.any()),
        "time_at_goal": int(at_goal.sum()),
    }


def _check_has_legs(env_id: str) -> None:
    if ENV_TABLE.get(find_spec(env_id).id, {}).get("robot") not in ("ant", "humanoid"):
        raise ValueError(
            f"Gaits are those of a humanoid or an ant, but {env_id!r} is no env of either: "
            "use for instance HumanoidGoal-v0 or AntUMaze-v0"
        )


def walk_episodes(
    model: PolicyPredictor, env_id: str, n_episodes: int = 64, env_kwargs: dict[str, Any] | None = None, seed: int = EVAL_SEED
) -> list[dict[str, Any]]:
    """
    Describe how a model walks, for instance one that was loaded with ``DeepCRL.load()``.

    :param model: Anything that has ``predict``
    :param env_id: Id of one of this package's envs of a humanoid or an ant
    :param n_episodes: Number of episodes
    :param env_kwargs: Arguments of the env
    :param seed: Seed of the episodes
    :return: What each episode shows, see :func:`measure_walk`, and the seconds of a step, ``dt``
    :raises ValueError: if its robot is neither
    """
    _check_has_legs(env_id)
    single = make_env(env_id, env_kwargs)
    maze, dt = MazeMap.find(single), float(single.unwrapped.task.dt)  # type: ignore[attr-defined]
    episodes = play_episodes(model, env_id, n_episodes, env_kwargs, seed)
    return [{**measure_walk(episode, dt, maze), "dt": dt} for episode in episodes]


def _shares(episodes: Sequence[dict[str, Any]]) -> list[float]:
    """Share of each of ``CLASSES``."""
    return [np.mean([episode["kind"] == kind for episode in episodes]).item() for kind in CLASSES]


@dataclass(kw_only=True)
class WalkStudy(ComparisonOfDepths):
    """
    How humanoids and ants move, by depth (section 4.3).

    Fall time, height of the torso, distances, and a class for each episode, such as
    walking, throwing itself at the goal, or going over the wall.
    """

    name: ClassVar[str] = "walk"
    looks_into_models: ClassVar[bool] = True

    env: str = "HumanoidGoal-v0"
    """Env of a humanoid or an ant that is trained on"""
    depths: tuple[int, ...] = (4, 16)
    """Depths"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for env_id in (self.env, self.eval_env):
            _check_has_legs(env_id)

    def report(self, results: Results) -> Report:
        def measure(depth: int, seed: int, model: DeepCRL) -> list[dict[str, Any]]:
            episodes = walk_episodes(model, self.eval_env, self.n_eval_episodes, self.all_eval_env_kwargs)
            return [{"episode": number, **episode} for number, episode in enumerate(episodes)]

        rows = self.measure_models(measure)
        walks = {
            depth: [[row for row in rows if (row["depth"], row["seed"]) == (depth, seed)] for seed in range(self.seeds)]
            for depth in self.depths
        }
        notes = [
            f"Trained on {self.env}. Each seed plays {self.n_eval_episodes} episodes of {self.eval_env}, the same for all, "
            f"with deterministic actions. Shares of the episodes: {self.averaging().lower()}. "
            "Reached the goal is a share too. The other rows are medians over the episodes, that of the fall over those "
            "with one; what comes after a fall does not count. A fall is a torso out of the healthy heights, on either side.",
            f"Goes over the wall: the torso was above a wall, at least {OVER_WALL:g} of a cell inside. Walks: stayed at the "
            f"goal for {STAY_SECONDS:g} s, or never fell and got further than {STANDING_RADIUS:g} m or to the goal. Stands: "
            f"never fell otherwise. Falls at the goal: at most {AT_GOAL:g} m from it, after at least {APPROACH:g} of the "
            "distance at the start. Falls on the way: all other falls.",
        ]
        columns = {f"depth {depth}": self._describe(seeds) for depth, seeds in walks.items()}
        measures = columns[f"depth {self.depths[0]}"]
        table = [{"": measure, **{depth: column[measure] for depth, column in columns.items()}} for measure in measures]
        return Report(f"Gaits on {self.eval_env}", rows, table, notes, self._figure(walks))

    @staticmethod
    def _describe(seeds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """A column of the table."""
        episodes = [episode for seed in seeds for episode in seed]
        falls = [episode["fall_step"] * episode["dt"] for episode in episodes if episode["fall_step"] is not None]
        medians = {
            name.replace("_", " ") + " (m)": f"{np.median([episode[name] for episode in episodes]):.2f}" for name in LENGTHS
        }
        return {
            **dict(zip(CLASSES, interquartile_means(np.array([_shares(seed) for seed in seeds])), strict=True)),
            "reached the goal": f"{np.mean([episode['reached'] for episode in episodes]):.2f}",
            "fall after (s)": f"{np.median(falls):.1f}" if falls else "-",
            **medians,
        }

    def _figure(self, walks: dict[int, list[list[dict[str, Any]]]]) -> Any:
        from matplotlib import colormaps

        figure, axes = new_figure(1, 2, width=4.6)
        upright_ax, share_ax = axes[0]
        for (depth, seeds), color in zip(walks.items(), depth_colors(self.depths).values(), strict=True):
            episodes = [episode for seed in seeds for episode in seed]
            steps = np.arange(max(episode["steps"] for episode in episodes) + 1)
            falls = np.array([episode["fall_step"] or np.inf for episode in episodes])
            share = np.mean(falls[:, None] > steps, axis=0)
            upright_ax.plot(steps * episodes[0]["dt"], share, color=color, label=f"depth {depth}")
        upright_ax.set(xlabel="seconds", ylabel="share of the episodes", ylim=(-0.02, 1.02), title="Still upright")
        upright_ax.legend()
        bottom = np.zeros(len(walks))
        means = np.array([np.mean([_shares(seed) for seed in seeds], axis=0) for seeds in walks.values()])
        colors = colormaps["RdYlGn_r"](np.linspace(0.1, 0.9, len(CLASSES)))
        for kind, share, color in zip(CLASSES, means.T, colors, strict=True):
            share_ax.bar([f"depth {depth}" for depth in walks], share, bottom=bottom, color=color, label=kind, width=0.6)
            bottom += share
        share_ax.set(ylabel="share of the episodes", ylim=(0, 1), title="What happened")
        handles, labels = share_ax.get_legend_handles_labels()
        share_ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.02, 0.5))
        figure.suptitle(self.caption())
        return figure
