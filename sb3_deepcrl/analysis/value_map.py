from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.envs.goal_env import GoalEnv
from sb3_deepcrl.envs.scenes import Maze

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class MazeMap:
    """
    Where the walls of a maze are.

    :param walls: Whether each cell is a wall, shape ``(n_rows, n_columns)``
    :param cell_size: Side of a cell, in metres
    :param origin: x and y of the centre of the cell in row 0 and column 0, in metres
    :param column_step: x and y from a cell to the one in the next column, in metres
    :param row_step: x and y from a cell to the one in the next row, in metres
    """

    walls: np.ndarray
    cell_size: float
    origin: np.ndarray
    column_step: np.ndarray
    row_step: np.ndarray

    @classmethod
    def from_env(cls, env: gym.Env) -> "MazeMap":
        """
        :param env: A maze of this package or of gymnasium-robotics, wrapped or not
        :return: Its map
        :raises ValueError: if the env has no maze
        """
        if not isinstance(env, gym.Env):
            raise ValueError(f"A value map needs a single env, not a {type(env).__name__}: make one with `gym.make()`")
        scene = env.unwrapped.task.scene if isinstance(env.unwrapped, GoalEnv) else None
        if isinstance(scene, Maze):
            n_rows, n_columns = scene.layout.shape
            walls = [[scene.layout.is_wall(row, column) for column in range(n_columns)] for row in range(n_rows)]
            size = scene.cell_size
            return cls(np.array(walls), size, np.zeros(2), column_step=np.array([0.0, size]), row_step=np.array([size, 0.0]))
        maze = getattr(env.unwrapped, "maze", None)
        if maze is None:
            raise ValueError(f"{env} has no maze to draw: value maps need a maze env such as PointMaze_UMaze-v3")
        origin, next_column, next_row = (np.asarray(maze.cell_rowcol_to_xy(cell)) for cell in ((0, 0), (0, 1), (1, 0)))
        return cls(
            walls=np.array([[cell == 1 for cell in row] for row in maze.maze_map]),
            cell_size=float(maze.maze_size_scaling),
            origin=origin,
            column_step=next_column - origin,
            row_step=next_row - origin,
        )

    def centers(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """
        :param rows: Rows, may be fractions
        :param columns: Columns, may be fractions, same shape
        :return: x and y in metres, same shape with a last axis of 2
        """
        return self.origin + rows[..., None] * self.row_step + columns[..., None] * self.column_step

    def is_wall(self, xy: np.ndarray) -> np.ndarray:
        """
        :param xy: Positions in metres, last axis of 2
        :return: Whether each lies in a wall or outside of the maze
        """
        steps = np.stack([self.row_step, self.column_step], axis=1)
        cells = np.rint((np.asarray(xy) - self.origin) @ np.linalg.inv(steps).T).astype(int)
        inside = ((cells >= 0) & (cells < self.walls.shape)).all(axis=-1)
        cells = np.clip(cells, 0, np.array(self.walls.shape) - 1)
        return ~inside | self.walls[cells[..., 0], cells[..., 1]]

    def limits(self) -> tuple[float, float, float, float]:
        """
        :return: Smallest and largest x, smallest and largest y of the maze, in metres
        """
        n_rows, n_columns = self.walls.shape
        corners = self.centers(np.array([-0.5, n_rows - 0.5]), np.array([-0.5, n_columns - 0.5]))
        (x_min, y_min), (x_max, y_max) = corners.min(axis=0), corners.max(axis=0)
        return x_min, x_max, y_min, y_max


def observations_at(observation: dict[str, np.ndarray], xy: np.ndarray, goal: np.ndarray) -> dict[str, np.ndarray]:
    """
    Put the robot of an observation at other places.

    :param observation: One observation, without batch axis, whose achieved goal starts with the position
    :param xy: Positions, shape ``(n, 2)``, in metres
    :param goal: Desired goal, x and y in metres
    :return: Observations of shape ``(n, ...)``, the same as the given one but for x and y of position and goal
    :raises ValueError: if the achieved goal is not a position
    """
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


def value_map(
    model: DeepCRL, observation: dict[str, np.ndarray], xy: np.ndarray, goal: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Value of the policy at many places, for one goal (figure 9 of the paper).

    :param model: The trained model
    :param observation: One observation of the env, without batch axis: everything but position and goal is taken from it
    :param xy: Positions, shape ``(n, 2)``, in metres
    :param goal: Desired goal, x and y in metres
    :return: Energies of shape ``(n,)``, the higher the nearer to the goal, and the actions that the policy takes in [-1, 1],
        shape ``(n, action_dim)``
    """
    observations = observations_at(observation, xy, np.asarray(goal))
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        observations = vec_normalize.normalize_obs(observations)  # type: ignore[assignment]
    obs_tensor, _ = model.policy.obs_to_tensor(observations)
    assert isinstance(obs_tensor, dict)
    model.policy.set_training_mode(False)
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
) -> "Axes":
    """
    Draw the value over a maze, with the actions of the policy as arrows if they are two-dimensional.
    The picture reads as the maze's text does: rows from top to bottom.

    :param model: The trained model
    :param env: The maze env
    :param goal: Desired goal, x and y in metres; the one of the reset by default
    :param seed: Seed of the reset that the rest of the observation is taken from
    :param ax: Where to draw, a new figure by default
    :param points_per_cell: Number of points along the side of a cell
    :return: The axes
    :raises ValueError: if the env has no maze, or the goal lies in a wall
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    maze = MazeMap.from_env(env)
    observation, _ = env.reset(seed=seed)
    goal = observation["desired_goal"][:2] if goal is None else np.asarray(goal, dtype=np.float64)
    if maze.is_wall(goal):
        raise ValueError(f"The goal {goal} lies in a wall or outside of the maze: choose x and y of a free cell")

    x_min, x_max, y_min, y_max = maze.limits()
    n_x, n_y = (round((high - low) / maze.cell_size * points_per_cell) for low, high in ((x_min, x_max), (y_min, y_max)))
    x = x_min + (np.arange(n_x) + 0.5) * (x_max - x_min) / n_x
    y = y_min + (np.arange(n_y) + 0.5) * (y_max - y_min) / n_y
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    free = ~maze.is_wall(grid)
    values = np.full(free.shape, np.nan)
    actions = np.zeros((*free.shape, *model.action_space.shape))  # type: ignore[misc]
    values[free], actions[free] = value_map(model, observation, grid[free], goal)

    if ax is None:
        _, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    # Which of x and y runs along the rows of the maze
    across = int(maze.column_step[0] == 0)
    order = [across, 1 - across]
    limits = [(x_min, x_max), (y_min, y_max)]
    image = ax.imshow(values.T if across else values, origin="lower", extent=(*limits[across], *limits[1 - across]))
    ax.figure.colorbar(image, ax=ax, label="value (minus distance of the representations)", shrink=0.85)
    for row, column in zip(*np.nonzero(maze.walls), strict=True):
        left, bottom = (maze.centers(np.array(row), np.array(column)) - maze.cell_size / 2)[order]
        ax.add_patch(Rectangle((left, bottom), maze.cell_size, maze.cell_size, facecolor="0.25", edgecolor="0.25"))
    if model.action_space.shape == (2,):
        # About four arrows along the side of a cell, in the middle of their part of it
        step = max(points_per_cell // 4, 1)
        part = (slice(step // 2, None, step), slice(step // 2, None, step))
        starts, arrows = grid[part][free[part]], actions[part][free[part]]
        ax.quiver(*starts.T[order], *arrows.T[order], angles="xy", color="white", width=0.003)
    ax.plot(*goal[order], marker="*", markersize=18, color="tab:red", markeredgecolor="white", linestyle="none", label="goal")
    ax.set(xlabel=f"{'xy'[across]} (m)", ylabel=f"{'yx'[across]} (m)", aspect="equal")
    if maze.row_step[1 - across] > 0:
        ax.invert_yaxis()
    ax.legend(loc="upper right", framealpha=0.9)
    return ax
