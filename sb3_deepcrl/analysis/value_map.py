"""
The learned value over a maze, and how much it looks like the distance to the goal: through the maze, or through its walls.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from matplotlib.axes import Axes
from scipy.spatial.distance import cdist

from sb3_deepcrl.analysis.episodes import EVAL_SEED, make_env
from sb3_deepcrl.analysis.mazes import MazeMap
from sb3_deepcrl.analysis.report import STAR, Report, Results, depth_table, new_figure, scores_by_depth
from sb3_deepcrl.analysis.statistics import interquartile_mean, rank_correlation
from sb3_deepcrl.analysis.study import ComparisonOfDepths
from sb3_deepcrl.deepcrl import DeepCRL

ALL_PAIRS = "all"
# Columns of the correlations and what they are with
DISTANCES = {"correlation_maze": "way through the maze", "correlation_straight": "straight line"}


def _observations_at(observation: dict[str, np.ndarray], xy: np.ndarray, goal: np.ndarray) -> dict[str, np.ndarray]:
    """Observations ``(n, ...)``: the given one (without batch axis) but for x and y of position and goal."""
    achieved = observation["achieved_goal"]
    if achieved.shape not in ((2,), (3,)):
        raise ValueError(f"The achieved goal must be x, y and perhaps z, got an array of shape {achieved.shape}")
    batch = {key: np.repeat(value[None].astype(np.float32), len(xy), axis=0) for key, value in observation.items()}
    batch["achieved_goal"][:, :2] = xy
    batch["desired_goal"][:, :2] = goal
    for key, value in observation.items():
        # Many envs give the position in the observation, too
        if key not in ("achieved_goal", "desired_goal") and value.ndim == 1 and np.allclose(value[:2], achieved[:2]):
            batch[key][:, :2] = xy
    return batch


def network_inputs(model: DeepCRL, observations: dict[str, np.ndarray]) -> dict[str, th.Tensor]:
    """What the networks of a model, put into evaluation mode, see of observations: normalized if it was trained so."""
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        observations = vec_normalize.normalize_obs(observations)  # type: ignore[assignment]
    obs_tensor, _ = model.policy.obs_to_tensor(observations)
    assert isinstance(obs_tensor, dict)
    model.policy.set_training_mode(False)
    return obs_tensor


def value_map(
    model: DeepCRL, observation: dict[str, np.ndarray], xy: np.ndarray, goal: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Value of the policy at many places, for one goal (figure 9 of the paper).

    :param model: The trained model
    :param observation: One observation of the env, without batch axis: everything but position and goal is taken from it
    :param xy: Positions, shape ``(n, 2)``, in meters
    :param goal: Desired goal, x and y in meters
    :return: Energies of shape ``(n,)``, the higher the nearer to the goal, and the actions that the policy takes, in [-1, 1]
        or discrete, shape ``(n, action_dim)``
    """
    obs_tensor = network_inputs(model, _observations_at(observation, xy, np.asarray(goal)))
    with th.no_grad():
        actions = model.actor(obs_tensor, deterministic=True)
        values = model.critic(obs_tensor, actions)
    return values.squeeze(1).cpu().numpy(), actions.cpu().numpy()


def plot_value_map(
    model: DeepCRL,
    env: gym.Env,
    goal: Sequence[float] | np.ndarray | None = None,
    seed: int | None = None,
    ax: Any = None,
    points_per_cell: int = 20,
) -> Axes:
    """
    Draw the value over a maze, with the actions of the policy as arrows if they are continuous and two-dimensional, and the
    shortest way from the start to the goal. The picture reads as the maze's text does: rows from top to bottom.

    :param model: The trained model
    :param env: The maze env
    :param goal: Desired goal, x and y in meters; the one of the reset by default
    :param seed: Seed of the reset that the start and the rest of the observation are taken from
    :param ax: Where to draw, a new figure by default
    :param points_per_cell: Number of points along the side of a cell
    :return: The axes
    :raises ValueError: if the model is no DeepCRL, the env has no maze, or the goal lies in a wall
    """
    if not isinstance(model, DeepCRL):
        raise ValueError(f"The value is that of DeepCRL's critic, which {type(model).__name__} has not")
    maze = MazeMap.from_env(env)
    observation, _ = env.reset(seed=seed)
    (place,) = _check_goals(maze, [observation["desired_goal"][:2] if goal is None else goal])

    rows, columns = ((np.arange(n * points_per_cell) + 0.5) / points_per_cell - 0.5 for n in maze.walls.shape)
    grid = maze.positions(np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1))
    free = ~maze.is_wall(grid)
    values = np.full(free.shape, np.nan)
    values[free], actions = value_map(model, observation, grid[free], place)

    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    image = ax.imshow(values, extent=maze.extent)
    ax.figure.colorbar(image, ax=ax, label="value (minus distance of the representations)", shrink=0.85)
    maze.draw(ax)
    if isinstance(model.action_space, spaces.Box) and model.action_space.shape == (2,):
        # About four arrows along the side of a cell, in the middle of their part of it
        step = max(points_per_cell // 4, 1)
        drawn = np.zeros_like(free)
        drawn[step // 2 :: step, step // 2 :: step] = True
        starts, arrows = (maze.to_picture(array) for array in (grid[drawn & free], actions[drawn[free]]))
        ax.quiver(*starts.T, *arrows.T, angles="xy", color="white", width=0.003)
    start = observation["achieved_goal"][:2]
    ax.plot(*maze.to_picture(maze.shortest_way(start, place)).T, "--", color="tab:red", linewidth=2, label="shortest way")
    circle: dict[str, Any] = dict(marker="o", markersize=10, color="white", markeredgecolor="black", linestyle="none")
    ax.plot(*maze.to_picture(start), label="start", **circle)
    ax.plot(*maze.to_picture(place), label="goal", markersize=18, **STAR)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    return ax


# --- Does the value know the walls? -------------------------------------------------------------------------------------


class ValueCorrelation(NamedTuple):
    """
    Spearman's rank correlation of the value with minus a distance to the goal. One means that the value puts the places in
    the same order as the distance does.

    :param goal: x and y of the goal in meters, None for many goals
    :param n_pairs: Number of pairs of a place and a goal
    :param maze: Correlation with the length of the shortest way through the maze
    :param straight: Correlation with the length of the straight line, through walls
    """

    goal: tuple[float, float] | None
    n_pairs: int
    maze: float
    straight: float


def _correlate(
    values: np.ndarray, ways: np.ndarray, lines: np.ndarray, goal: tuple[float, float] | None = None
) -> ValueCorrelation:
    """Correlate values with both distances; pairs without a way (of infinite length) are left out."""
    has_way = np.isfinite(ways)
    maze, straight = (rank_correlation(values[has_way], -lengths[has_way]) for lengths in (ways, lines))
    return ValueCorrelation(goal, int(has_way.sum()), maze, straight)


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
    :param goals: Goals to look at one by one, x and y in meters
    :param points_per_cell: Number of places along the side of a cell
    :param seed: Seed of the reset that the rest of the observation is taken from
    :return: First of all pairs of a place and the center of a free cell, as the goal, together; then of each of the goals
    :raises ValueError: if the env has no maze, or a goal lies in a wall
    """
    maze = MazeMap.from_env(env)
    observation, _ = env.reset(seed=seed)
    places = maze.places(points_per_cell)
    centers = maze.places()
    goals = _check_goals(maze, goals)
    targets = np.concatenate([centers, goals])
    values = np.stack([value_map(model, observation, places, goal)[0] for goal in targets], axis=1)
    pairs = np.stack([values, maze.distances(places, targets), cdist(places, targets)])
    of_all, *of_each = np.split(pairs, np.arange(len(centers), len(targets)), axis=-1)
    return [
        _correlate(*of_all),
        *(_correlate(of_one[0], of_one[1], of_one[2], (x, y)) for of_one, (x, y) in zip(of_each, goals.tolist(), strict=True)),
    ]


def _check_goals(maze: MazeMap, goals: np.ndarray | Sequence[Any]) -> np.ndarray:
    """The goals as an array of shape ``(n, 2)``, if all of them lie in free cells."""
    array = np.asarray(goals, dtype=np.float64)
    array = array.reshape(-1, 2) if not len(array) else array
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"Goals must be x and y each, shape (n, 2), got shape {array.shape}")
    for goal in array[maze.is_wall(array)]:
        (x_min, y_min), (x_max, y_max) = np.sort(maze.corners, axis=0)
        raise ValueError(
            f"The goal {goal.tolist()} lies in a wall or outside of the maze, which spans x from {x_min} to {x_max} m and y "
            f"from {y_min} to {y_max} m: choose x and y of a free cell"
        )
    return array


def _far_goals(env: gym.Env, seed: int | None = None) -> np.ndarray:
    """Goals to which the way from the start is at least half as long as the longest one, the farthest first, ``(n, 2)``."""
    maze = MazeMap.from_env(env)
    observation, _ = env.reset(seed=seed)
    ways = maze.distances(observation["achieved_goal"][None, :2], maze.goals)[0]
    ways[~np.isfinite(ways)] = -1
    order = np.argsort(-ways, kind="stable")
    return maze.goals[order[ways[order] >= ways.max() / 2]]


@dataclass(kw_only=True)
class ValueMapStudy(ComparisonOfDepths):
    """
    Does the value follow the maze? (figure 9)

    The value over the maze for models of several depths, and as a number how much it is like the
    distance through the maze and like the straight line.
    """

    name: ClassVar[str] = "value_map"
    looks_into_models: ClassVar[bool] = True

    goal: tuple[float, float] | None = None
    """x and y of the goal of the picture in meters, by default of the farthest one"""
    points_per_cell: int = 3
    """Number of places along the side of a cell that are correlated"""

    def __post_init__(self) -> None:
        if self.goal is not None:
            self.goal = float(self.goal[0]), float(self.goal[1])
        super().__post_init__()
        with make_env(self.eval_env, self.all_eval_env_kwargs) as env:
            _check_goals(MazeMap.from_env(env), [] if self.goal is None else [self.goal])

    def report(self, results: Results) -> Report:
        with make_env(self.eval_env, self.all_eval_env_kwargs) as env:
            goals = _far_goals(env, EVAL_SEED)
            goal = goals[0] if self.goal is None else np.array(self.goal)
            figure, axes = new_figure(1, len(self.depths) + 1, width=4.4, height=4.6)

            def measure(depth: int, seed: int, model: DeepCRL) -> Iterator[dict[str, Any]]:
                if seed == 0:
                    ax = plot_value_map(model, env, goal, EVAL_SEED, axes[0, self.depths.index(depth)])
                    ax.set_title(f"depth {depth}")
                for found in value_correlations(model, env, goals, self.points_per_cell, EVAL_SEED):
                    name = ALL_PAIRS if found.goal is None else " ".join(f"{x:g}" for x in found.goal)
                    correlations = {"correlation_maze": found.maze, "correlation_straight": found.straight}
                    yield {"goal": name, "n_pairs": found.n_pairs, **correlations}

            rows, maze = self.measure_models(measure), MazeMap.from_env(env)
        # By pairs and distance, for each depth those of all seeds
        scores = {
            f"{kind}: {name}": scores_by_depth([row for row in rows if (row["goal"] == ALL_PAIRS) == is_all], column)
            for kind, is_all in (("all pairs", True), ("far goals", False))
            for column, name in DISTANCES.items()
        }
        self._draw_correlations(axes[0, -1], scores)
        self._share_colors(axes[0, :-1])
        figure.suptitle(f"{self.eval_env.removesuffix('-v0')}: value for the goal at the star")
        places, centers = maze.places(self.points_per_cell), maze.places()
        lines = cdist(places, centers)
        both = _correlate(-lines, maze.distances(places, centers), lines).maze
        notes = [
            "Spearman's rank correlation of the value with minus the distance to the goal. Way through the maze: the shortest "
            "one of a point around the walls. Straight line: through the walls. 1 means that the value puts the places in the "
            f"order of that distance. Trained on {self.env}. {self.averaging()}.",
            f"All pairs: {len(places)} places in all free cells with {len(centers)} goals, the centers of the cells. The two "
            f"distances themselves correlate with {both:.2f}. Far goals: each of the {len(goals)} goals of {self.eval_env} "
            "that are at least half as far from the start as the farthest one, then the mean.",
            f"The picture shows the value for the goal at x = {goal[0]:g}, y = {goal[1]:g} (star) by the models with seed 0, "
            "in one scale of colors.",
        ]
        return Report(f"Value maps on {self.env}", rows, depth_table(scores), notes, figure)

    @staticmethod
    def _share_colors(axes: Sequence[Axes]) -> None:
        """Give the maps one color scale, and the last one its colorbar."""
        images = [ax.images[0] for ax in axes]
        limits = np.array([image.get_clim() for image in images])
        for image in images:
            image.set_clim(limits[:, 0].min(), limits[:, 1].max())
        for image in images[:-1]:
            image.colorbar.remove()  # type: ignore[union-attr]

    def _draw_correlations(self, ax: Axes, scores: dict[str, dict[int, np.ndarray]]) -> None:
        for (name, by_depth), color, style in zip(scores.items(), ("C0", "C1") * 2, ("-", "-", "--", "--"), strict=True):
            means = [interquartile_mean(by_depth[depth]).mean for depth in self.depths]
            ax.plot(range(len(means)), means, style, marker="o", color=color, label=name)
            ax.plot(range(len(means)), [by_depth[depth] for depth in self.depths], ".", color=color, alpha=0.6)
        ax.set(xlabel="depth", ylabel="rank correlation with the value", xlim=(-0.5, len(self.depths) - 0.5))
        ax.set_xticks(range(len(self.depths)), map(str, self.depths))
        ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False, handlelength=4)
