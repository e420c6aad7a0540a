from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from sb3_deepcrl.envs.layouts import Layout
from sb3_deepcrl.envs.scenes import Maze

WALL_COLOR = "0.35"


def plot_maze(env: Any, trajectories: Iterable[np.ndarray] = (), ax: "Axes | None" = None) -> "Axes":
    """
    Draw a maze from above: walls, start cells, goal cells, the goals of the running episodes, and trajectories.

    The picture reads as the maze's text does, and as the top-down camera shows it: x runs down, y to the right, in metres.

    :param env: A maze environment (wrapped or not), a vectorized one, or a ``Layout``, which is drawn with cells of 1 m
    :param trajectories: Positions to connect, each of shape (steps, 2 or more), e.g. the achieved goals of an episode
    :param ax: Where to draw. None makes a new figure
    :return: Where it was drawn
    :raises ValueError: If the environment has no maze
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    layout, size, pairs, goals = _read(env)
    if ax is None:
        n_rows, n_columns = layout.shape
        _, ax = plt.subplots(figsize=(0.6 * n_columns + 1.5, 0.6 * n_rows + 1))
    for row, column, n_rows, n_columns in layout.wall_boxes():
        corner = (column - 0.5) * size, (row - 0.5) * size
        ax.add_patch(Rectangle(corner, n_columns * size, n_rows * size, facecolor=WALL_COLOR, edgecolor="none"))
    for cells, color, label in ((pairs[:, 1], "tab:green", "goal cells"), (pairs[:, 0], "tab:blue", "start cells")):
        xy = np.unique(cells, axis=0) * size
        ax.scatter(xy[:, 1], xy[:, 0], color=color, marker="s", s=60, alpha=0.35, label=label)
    if len(goals):
        ax.scatter(goals[:, 1], goals[:, 0], color="tab:green", marker="*", s=160, label="goal", zorder=3)
    for i, trajectory in enumerate(trajectories):
        points = np.asarray(trajectory)
        # One entry of the legend stands for all of them
        ax.plot(points[:, 1], points[:, 0], linewidth=1, label="_" if i else "trajectory")
        ax.scatter(points[:1, 1], points[:1, 0], color="black", s=12, zorder=3, label="_" if i else "trajectory start")
    n_rows, n_columns = layout.shape
    ax.set_xlim(-0.5 * size, (n_columns - 0.5) * size)
    # Inverted, so that row 0 is at the top
    ax.set_ylim((n_rows - 0.5) * size, -0.5 * size)
    ax.set_aspect("equal")
    ax.set_xlabel("y (m)")
    ax.set_ylabel("x (m)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax


def _read(env: Any) -> tuple[Layout, float, np.ndarray, np.ndarray]:
    """
    :param env: See :func:`plot_maze`
    :return: Layout, cell size, pairs of start and goal cells, and goals of the running episodes
    """
    if isinstance(env, Layout):
        pairs = np.array([(start, goal) for start in env.starts for goal in env.goals])
        return env, 1.0, pairs, np.zeros((0, 2))
    core = env.unwrapped
    if hasattr(core, "simulation"):
        scene, goals = core.simulation.task.scene, core.simulation.goals
    elif hasattr(core, "get_attr"):
        scene, goals = core.get_attr("task")[0].scene, np.array(core.get_attr("goal"))
    else:
        scene, goals = None, np.zeros((0, 2))
    if not isinstance(scene, Maze):
        raise ValueError(f"{type(core).__name__} has no maze to draw. plot_maze needs a maze environment of this package.")
    return scene.layout, scene.cell_size, scene.pairs, goals
