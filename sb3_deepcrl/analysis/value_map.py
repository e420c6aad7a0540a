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

# By how much walls are smaller for a line of sight than they are, in cells, so that it may touch them
TOUCH = 1e-6


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
        maze = cls.find(env)
        if maze is None:
            raise ValueError(f"{env} has no maze to draw: value maps need a maze env such as PointMaze_UMaze-v3")
        return maze

    @classmethod
    def find(cls, env: gym.Env) -> "MazeMap | None":
        """
        :param env: An env, wrapped or not
        :return: The map of its maze, None if it has none
        """
        scene = env.unwrapped.task.scene if isinstance(env.unwrapped, GoalEnv) else None
        if isinstance(scene, Maze):
            n_rows, n_columns = scene.layout.shape
            walls = [[scene.layout.is_wall(row, column) for column in range(n_columns)] for row in range(n_rows)]
            size = scene.cell_size
            return cls(np.array(walls), size, np.zeros(2), column_step=np.array([0.0, size]), row_step=np.array([size, 0.0]))
        maze = getattr(env.unwrapped, "maze", None)
        if maze is None:
            return None
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

    def rows_and_columns(self, xy: np.ndarray) -> np.ndarray:
        """
        :param xy: Positions in metres, last axis of 2
        :return: Row and column of each as fractions, same shape
        """
        steps = np.stack([self.row_step, self.column_step], axis=1)
        return (np.asarray(xy) - self.origin) @ np.linalg.inv(steps).T

    def places(self, points_per_cell: int = 1) -> np.ndarray:
        """
        :param points_per_cell: Number of points along the side of a cell
        :return: x and y of evenly spaced points in all free cells in metres, shape ``(n, 2)``
        """
        shifts = (np.arange(points_per_cell) + 0.5) / points_per_cell - 0.5
        cells = np.argwhere(~self.walls)[:, None, None, :]
        rows, columns = np.broadcast_arrays(cells[..., 0] + shifts[:, None], cells[..., 1] + shifts)
        return self.centers(rows, columns).reshape(-1, 2)

    def distances(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """
        Length of the shortest way of a point through the maze. It is exact: such a way is straight but where it turns at
        a corner of a wall, so it leads along lines of sight between its ends and corners.

        :param sources: Positions in metres, shape ``(n_sources, 2)``
        :param targets: Positions in metres, shape ``(n_targets, 2)``
        :return: Lengths in metres, shape ``(n_sources, n_targets)``; infinite where no way leads
        """
        first, last = self.rows_and_columns(sources), self.rows_and_columns(targets)
        corners, obstacles = self._corners(), self._obstacles()
        between = _lengths_in_sight(corners, corners, obstacles)
        # Floyd and Warshall's algorithm
        for corner in range(len(corners)):
            between = np.minimum(between, between[:, corner, None] + between[corner])
        lengths = _lengths_in_sight(first, last, obstacles)
        if len(corners):
            to_target = (between[:, :, None] + _lengths_in_sight(corners, last, obstacles)).min(axis=1)
            from_source = _lengths_in_sight(first, corners, obstacles)
            for corner in range(len(corners)):
                lengths = np.minimum(lengths, from_source[:, corner, None] + to_target[corner])
        return lengths * self.cell_size

    def _corners(self) -> np.ndarray:
        """
        :return: Row and column of the corners around which a way can turn, shape ``(n, 2)``
        """
        walls = np.pad(self.walls, 1, constant_values=True).astype(int)
        n_walls_around = walls[:-1, :-1] + walls[1:, :-1] + walls[:-1, 1:] + walls[1:, 1:]
        return np.argwhere(n_walls_around == 1) - 0.5

    def _obstacles(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """
        :return: Smallest and largest row and column of boxes that no line of sight passes
        """
        boxes: list[tuple[np.ndarray, np.ndarray]] = []
        # Rows and columns of walls, so that there is no way between two neighbors
        for along, walls in ((1, self.walls), (0, self.walls.T)):
            edges = np.diff(np.pad(walls, ((0, 0), (1, 1))).astype(int), axis=1)
            starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
            for (line, start), (_, end) in zip(starts, ends, strict=True):
                low, high = np.array([line - 0.5, start - 0.5]) + TOUCH, np.array([line + 0.5, end - 0.5]) - TOUCH
                boxes.append((low, high) if along else (low[::-1], high[::-1]))
        # Nor between two that touch at a corner
        walls = self.walls
        falling = walls[:-1, :-1] & walls[1:, 1:] & ~walls[1:, :-1] & ~walls[:-1, 1:]
        rising = ~walls[:-1, :-1] & ~walls[1:, 1:] & walls[1:, :-1] & walls[:-1, 1:]
        boxes += [(corner + 0.5 - 2 * TOUCH, corner + 0.5 + 2 * TOUCH) for corner in np.argwhere(falling | rising)]
        return boxes

    def is_wall(self, xy: np.ndarray) -> np.ndarray:
        """
        :param xy: Positions in metres, last axis of 2
        :return: Whether each lies in a wall or outside of the maze
        """
        cells = np.rint(self.rows_and_columns(xy)).astype(int)
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

    def to_picture(self, xy: np.ndarray) -> np.ndarray:
        """
        :param xy: Positions or directions in metres, last axis of 2
        :return: The same with the coordinate first that runs along the rows of the maze, from left to right in a picture
        """
        return np.asarray(xy)[..., ::-1] if self.column_step[0] == 0 else np.asarray(xy)

    def draw(self, ax: "Axes") -> None:
        """
        Draw the walls, so that the picture reads as the maze's text does: rows from top to bottom.

        :param ax: Where
        """
        from matplotlib.patches import Rectangle

        for row, column in np.argwhere(self.walls):
            left, bottom = self.to_picture(self.centers(np.array(row), np.array(column))) - self.cell_size / 2
            ax.add_patch(Rectangle((left, bottom), self.cell_size, self.cell_size, facecolor="0.25", edgecolor="0.25"))
        x_min, x_max, y_min, y_max = self.limits()
        (left, bottom), (right, top) = self.to_picture(np.array([(x_min, y_min), (x_max, y_max)]))
        across, up = ("y", "x") if self.column_step[0] == 0 else ("x", "y")
        ax.set(xlabel=f"{across} (m)", ylabel=f"{up} (m)", aspect="equal", xlim=(left, right), ylim=(bottom, top))
        if self.to_picture(self.row_step)[1] > 0:
            ax.invert_yaxis()


def _lengths_in_sight(first: np.ndarray, last: np.ndarray, obstacles: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """
    :param first: Points, shape ``(n, 2)``
    :param last: Points, shape ``(m, 2)``
    :param obstacles: Boxes that no line of sight passes
    :return: Lengths of the straight lines between them, shape ``(n, m)``; infinite where a box is in the way
    """
    steps = last[None] - first[:, None]
    lengths = np.hypot(steps[..., 0], steps[..., 1])
    # Lines along an axis, which never meet the sides of a box that run along it, meet them far away instead
    divisors = np.where(np.abs(steps) < 1e-12, 1e-12, steps)
    for low, high in obstacles:
        meets_low, meets_high = (low - first)[:, None] / divisors, (high - first)[:, None] / divisors
        enters = np.minimum(meets_low, meets_high).max(axis=-1)
        leaves = np.maximum(meets_low, meets_high).min(axis=-1)
        lengths[np.maximum(enters, 0) < np.minimum(leaves, 1)] = np.inf
    return lengths


def goals_of(env: gym.Env) -> np.ndarray:
    """
    :param env: A maze of this package or of gymnasium-robotics, wrapped or not
    :return: x and y of all goals that it may set, but for noise, in metres, shape ``(n, 2)``
    :raises ValueError: if the env has no maze
    """
    MazeMap.from_env(env)
    scene = env.unwrapped.task.scene if isinstance(env.unwrapped, GoalEnv) else None
    if isinstance(scene, Maze):
        return np.unique(scene.pairs[:, 1], axis=0) * scene.cell_size
    return np.unique(env.unwrapped.maze.unique_goal_locations, axis=0)  # type: ignore[attr-defined]


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


def network_inputs(model: DeepCRL, observations: dict[str, np.ndarray]) -> dict[str, th.Tensor]:
    """
    :param model: The model, which is put into evaluation mode
    :param observations: Observations as the env gives them, each of shape ``(n, ...)``
    :return: What its networks see of them, normalised if the model was trained so
    """
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
    :param xy: Positions, shape ``(n, 2)``, in metres
    :param goal: Desired goal, x and y in metres
    :return: Energies of shape ``(n,)``, the higher the nearer to the goal, and the actions that the policy takes in [-1, 1],
        shape ``(n, action_dim)``
    """
    obs_tensor = network_inputs(model, observations_at(observation, xy, np.asarray(goal)))
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
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    transposed = maze.column_step[0] == 0
    (left, bottom), (right, top) = maze.to_picture(np.array([(x_min, y_min), (x_max, y_max)]))
    image = ax.imshow(values.T if transposed else values, origin="lower", extent=(left, right, bottom, top))
    ax.figure.colorbar(image, ax=ax, label="value (minus distance of the representations)", shrink=0.85)
    maze.draw(ax)
    if model.action_space.shape == (2,):
        # About four arrows along the side of a cell, in the middle of their part of it
        step = max(points_per_cell // 4, 1)
        part = (slice(step // 2, None, step), slice(step // 2, None, step))
        starts, arrows = (maze.to_picture(array[part][free[part]]) for array in (grid, actions))
        ax.quiver(*starts.T, *arrows.T, angles="xy", color="white", width=0.003)
    ax.plot(
        *maze.to_picture(goal),
        marker="*",
        markersize=18,
        color="tab:red",
        markeredgecolor="white",
        linestyle="none",
        label="goal",
    )
    ax.legend(loc="upper right", framealpha=0.9)
    return ax
