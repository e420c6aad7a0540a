"""
How much the learned value looks like the distance to the goal: through the maze, or through its walls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np

from sb3_deepcrl.analysis.runs import EVAL_SEED, make_single_env
from sb3_deepcrl.analysis.statistics import Estimate, interquartile_mean, rank_correlation
from sb3_deepcrl.analysis.study import ComparisonOfDepths, Report, Results, new_figure, option, scores_by_depth
from sb3_deepcrl.analysis.value_map import MazeMap, goals_of, plot_value_map, value_map
from sb3_deepcrl.deepcrl import DeepCRL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL_PAIRS = "all"
# Columns of the correlations and what they are with
DISTANCES = {"correlation_maze": "way through the maze", "correlation_straight": "straight line"}


class ValueCorrelation(NamedTuple):
    """
    Spearman's rank correlation of the value with minus a distance to the goal. One means that the value puts the places in
    the same order as the distance does.

    :param goal: x and y of the goal in metres, None for many goals
    :param n_pairs: Number of pairs of a place and a goal
    :param maze: Correlation with the length of the shortest way through the maze
    :param straight: Correlation with the length of the straight line, through walls
    """

    goal: tuple[float, float] | None
    n_pairs: int
    maze: float
    straight: float


def correlate(
    values: np.ndarray, ways: np.ndarray, lines: np.ndarray, goal: tuple[float, float] | None = None
) -> ValueCorrelation:
    """
    :param values: Values of places for goals
    :param ways: Lengths of the shortest ways from the places to the goals, same shape; pairs without a way are left out
    :param lines: Lengths of the straight lines, same shape
    :param goal: The goal, if there is a single one
    :return: How the values correlate with both
    """
    has_way = np.isfinite(ways)
    return ValueCorrelation(
        goal,
        int(has_way.sum()),
        maze=rank_correlation(values[has_way], -ways[has_way]),
        straight=rank_correlation(values[has_way], -lines[has_way]),
    )


def straight_distances(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """
    :param sources: Positions, shape ``(n_sources, 2)``
    :param targets: Positions, shape ``(n_targets, 2)``
    :return: Lengths of the straight lines between them, shape ``(n_sources, n_targets)``
    """
    return np.linalg.norm(sources[:, None] - targets, axis=-1)


def value_correlations(
    model: DeepCRL,
    env: gym.Env,
    goals: np.ndarray | Sequence[Sequence[float]] = (),
    points_per_cell: int = 3,
    seed: int | None = None,
) -> list[ValueCorrelation]:
    """
    Does the value know the walls? Correlate it with the distance through the maze and with the straight line, over evenly
    spaced places in all free cells (a number for figure 9 of the paper).

    :param model: The trained model
    :param env: A maze of this package or of gymnasium-robotics
    :param goals: Goals to look at one by one, x and y in metres
    :param points_per_cell: Number of places along the side of a cell
    :param seed: Seed of the reset that the rest of the observation is taken from
    :return: First of all pairs of a place and the center of a free cell, as the goal, together; then of each of the goals
    :raises ValueError: if the env has no maze, or a goal lies in a wall
    """
    maze = MazeMap.from_env(env)
    observation, _ = env.reset(seed=seed)
    places = maze.places(points_per_cell)
    centers = maze.places()
    goals = check_goals(maze, goals)
    targets = np.concatenate([centers, goals])
    values = np.stack([value_map(model, observation, places, goal)[0] for goal in targets], axis=1)
    ways, lines = maze.distances(places, targets), straight_distances(places, targets)
    n = len(centers)
    return [correlate(values[:, :n], ways[:, :n], lines[:, :n])] + [
        correlate(values[:, n + i], ways[:, n + i], lines[:, n + i], (float(x), float(y))) for i, (x, y) in enumerate(goals)
    ]


def check_goals(maze: MazeMap, goals: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """
    :param maze: The maze
    :param goals: Positions in metres
    :return: The same as an array of shape ``(n, 2)``
    :raises ValueError: if one has another shape or lies in a wall
    """
    array = np.asarray(goals, dtype=np.float64).reshape(-1, 2) if len(goals) == 0 else np.asarray(goals, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"Goals must be x and y each, shape (n, 2), got shape {array.shape}")
    for goal in array[maze.is_wall(array)]:
        x_min, x_max, y_min, y_max = maze.limits()
        raise ValueError(
            f"The goal {goal.tolist()} lies in a wall or outside of the maze, which spans x from {x_min} to {x_max} m and y "
            f"from {y_min} to {y_max} m: choose x and y of a free cell"
        )
    return array


def far_goals(env: gym.Env, seed: int | None = None) -> np.ndarray:
    """
    :param env: A maze of this package or of gymnasium-robotics
    :param seed: Seed of the reset that the start is taken from
    :return: Those goals of the env to which the way from the start is at least half as long as the longest one, the
        farthest first; x and y in metres, shape ``(n, 2)``
    """
    goals = goals_of(env)
    observation, _ = env.reset(seed=seed)
    ways = MazeMap.from_env(env).distances(observation["achieved_goal"][None, :2], goals)[0]
    ways[~np.isfinite(ways)] = -1
    order = np.argsort(-ways, kind="stable")
    return goals[order[ways[order] >= ways.max() / 2]]


@dataclass
class ValueMapStudy(ComparisonOfDepths):
    """
    The value over the maze for models of several depths (figure 9 of the paper), and as a number how much it is like the
    distance through the maze and like the straight line.
    """

    name: ClassVar[str] = "value_map"
    summary: ClassVar[str] = "the value over the maze, does it know the walls"

    goal: tuple[float, ...] = option((), "Goal of the picture in metres, by default the farthest", nargs=2, metavar=("X", "Y"))
    points_per_cell: int = option(3, "Number of places along the side of a cell that are correlated")

    def __post_init__(self) -> None:
        self.goal = tuple(map(float, self.goal))
        super().__post_init__()
        env = self._env()
        maze = MazeMap.from_env(env)
        env.close()
        if self.goal:
            check_goals(maze, [self.goal])

    def _env(self) -> gym.Env:
        return make_single_env(self.eval_env, self.env_kwargs)

    def report(self, results: Results, runs: Path) -> Report:
        env = self._env()
        goals = far_goals(env, EVAL_SEED)
        goal = np.array(self.goal) if self.goal else goals[0]
        rows: list[dict[str, Any]] = []
        shown: dict[int, DeepCRL] = {}
        for depth, seed, model in self.models(runs):
            shown.setdefault(depth, model)
            for found in value_correlations(model, env, goals, self.points_per_cell, EVAL_SEED):
                rows.append(
                    {
                        "depth": depth,
                        "seed": seed,
                        "timesteps": model.num_timesteps,
                        "goal": ALL_PAIRS if found.goal is None else " ".join(f"{x:g}" for x in found.goal),
                        "n_pairs": found.n_pairs,
                        "correlation_maze": round(found.maze, 4),
                        "correlation_straight": round(found.straight, 4),
                    }
                )
        scores = {
            (kind, column): scores_by_depth(
                [row for row in rows if (row["goal"] == ALL_PAIRS) == (kind == "all pairs")], column
            )
            for kind in ("all pairs", "far goals")
            for column in DISTANCES
        }
        names = [f"{kind}: {DISTANCES[column]}" for kind, column in scores]
        estimates = {
            depth: interquartile_mean(np.stack([by_depth[depth] for by_depth in scores.values()], axis=1))
            for depth in self.depths
        }
        table = [{"depth": depth, **dict(zip(names, estimates[depth], strict=True))} for depth in self.depths]
        maze = MazeMap.from_env(env)
        places, centers = maze.places(self.points_per_cell), maze.places()
        lines = straight_distances(places, centers)
        both = correlate(-lines, maze.distances(places, centers), lines).maze
        notes = [
            "Spearman's rank correlation of the value with minus the distance to the goal. Way through the maze: the shortest "
            "one of a point around the walls. Straight line: through the walls. 1 means that the value puts the places in the "
            f"order of that distance. Trained on {self.env}.",
            f"All pairs: {len(places)} places in all free cells with {len(centers)} goals, the centers of the cells. The two "
            f"distances themselves correlate with {both:.2f}. Far goals: each of the {len(goals)} goals of {self.eval_env} "
            "that are at least half as far from the start as the farthest one, then the mean. "
            f"{self.averaging()}.",
            f"The picture shows the value for the goal at x = {goal[0]:g}, y = {goal[1]:g} (star) by the models with seed 0, "
            "each with colors of its own. The circle is the start.",
        ]
        figure = self._figure(shown, env, goal, scores, estimates)
        env.close()
        return Report(f"Value maps on {self.env}", rows, table, notes, figure)

    def _figure(
        self,
        models: dict[int, DeepCRL],
        env: gym.Env,
        goal: np.ndarray,
        scores: dict[tuple[str, str], dict[int, np.ndarray]],
        estimates: dict[int, list[Estimate]],
    ) -> "Figure":
        figure, axes = new_figure(1, len(models) + 1, width=4.4, height=4.6)
        maze = MazeMap.from_env(env)
        observation, _ = env.reset(seed=EVAL_SEED)
        start = maze.to_picture(observation["achieved_goal"][:2])
        for ax, (depth, model) in zip(axes[0], models.items(), strict=False):
            plot_value_map(model, env, goal, EVAL_SEED, ax)
            ax.plot(*start, marker="o", markersize=10, color="white", markeredgecolor="black", linestyle="none", label="start")
            ax.set_title(f"depth {depth}")
            ax.get_legend().remove()
            ax.images[0].colorbar.set_label("value")
        ax = axes[0, -1]
        positions = np.arange(len(models))
        colors = dict(zip(DISTANCES, ("tab:blue", "tab:orange"), strict=True))
        for index, ((kind, column), by_depth) in enumerate(scores.items()):
            means = [estimates[depth][index].mean for depth in models]
            style = "-" if kind == "all pairs" else "--"
            ax.plot(positions, means, style, marker="o", color=colors[column], label=f"{DISTANCES[column]}, {kind}")
            for position, depth in zip(positions, models, strict=True):
                ax.plot([position] * len(by_depth[depth]), by_depth[depth], ".", color=colors[column], alpha=0.6)
        ax.set(xlabel="depth", ylabel="rank correlation with the value", xlim=(-0.5, len(models) - 0.5))
        ax.set_xticks(positions, [str(depth) for depth in models])
        ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False, handlelength=4)
        figure.suptitle(f"{self.eval_env.removesuffix('-v0')}: value for the goal at the star, start at the circle")
        return figure
