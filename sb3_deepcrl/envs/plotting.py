from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from sb3_deepcrl.envs.layouts import Layout, make_layout
from sb3_deepcrl.envs.scenes import Maze


def draw_walls(ax: "Axes", walls: np.ndarray, extent: Sequence[float], labels: tuple[str, str] = ("y", "x")) -> None:
    """
    Draw the walls of a maze, shape (rows, columns), as its text reads: rows run down, columns to the right. The extent are
    the coordinates in meters of the left, right, bottom and top edge of the maze in the picture.
    """
    from matplotlib.patches import Rectangle

    left, right, bottom, top = extent
    width, height = (right - left) / walls.shape[1], (bottom - top) / walls.shape[0]
    for row, column in np.argwhere(walls):
        ax.add_patch(Rectangle((left + column * width, top + row * height), width, height, facecolor="0.3", edgecolor="0.3"))
    ax.set(xlabel=f"{labels[0]} (m)", ylabel=f"{labels[1]} (m)", xlim=(left, right), ylim=(bottom, top), aspect="equal")


def plot_maze(env: Any, trajectories: Iterable[np.ndarray] = (), ax: "Axes | None" = None) -> "Axes":
    """
    Draw a maze from above: walls, start cells, goal cells, the goals of the running episodes, and trajectories.

    The picture reads as the maze's text does, and as the top-down camera shows it: x runs down, y to the right, in meters.

    :param env: A maze environment (wrapped or not), a vectorized one, or the name of a maze or a ``Layout``, which are
        drawn with cells of 1 m
    :param trajectories: Positions to connect, each of shape (steps, 2 or more), e.g. the achieved goals of an episode, or
        a single array of them
    :param ax: Where to draw. None makes a new figure
    :return: Where it was drawn
    :raises ValueError: If the environment has no maze
    """
    import matplotlib.pyplot as plt

    maze, goals = _read(env)
    (n_rows, n_columns), size = maze.layout.shape, maze.cell_size
    if ax is None:
        _, ax = plt.subplots(figsize=(0.6 * n_columns + 1.5, 0.6 * n_rows + 1))
    (top, left), (bottom, right) = maze.bounds
    draw_walls(ax, maze.layout.walls, (left, right, bottom, top))
    for cells, color, label in ((maze.pairs[:, 1], "tab:green", "goal cells"), (maze.pairs[:, 0], "tab:blue", "start cells")):
        xy = np.unique(cells, axis=0) * size
        ax.scatter(xy[:, 1], xy[:, 0], color=color, marker="s", s=60, alpha=0.35, label=label)
    if len(goals):
        ax.scatter(goals[:, 1], goals[:, 0], color="tab:green", marker="*", s=160, label="goal", zorder=3)
    if isinstance(trajectories, np.ndarray) and trajectories.ndim == 2:
        trajectories = [trajectories]
    for i, trajectory in enumerate(trajectories):
        points = np.asarray(trajectory)
        # One entry of the legend stands for all of them
        ax.plot(points[:, 1], points[:, 0], linewidth=1, label="_" if i else "trajectory")
        ax.scatter(points[:1, 1], points[:1, 0], color="black", s=12, zorder=3, label="_" if i else "trajectory start")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax


def _read(env: Any) -> tuple[Maze, np.ndarray]:
    """The maze, and the goals of the running episodes."""
    if isinstance(env, str | Layout):
        return Maze(make_layout(env), cell_size=1.0), np.zeros((0, 2))
    core = env.unwrapped
    if hasattr(core, "get_attr"):
        scene, goals = core.get_attr("task")[0].scene, np.array(core.get_attr("goal"))
    elif hasattr(core, "simulation"):
        scene, goals = core.task.scene, core.simulation.goals
    else:
        scene, goals = None, np.zeros((0, 2))
    if not isinstance(scene, Maze):
        raise ValueError(f"{type(core).__name__} has no maze to draw. plot_maze needs a maze environment of this package.")
    # Before the first episode they are zero, which is in the border
    return scene, goals[goals.any(axis=1)]
