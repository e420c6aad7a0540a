"""
Mazes seen from above: where their walls are, and how long the ways around them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np

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
    :param cell_size: Side of a cell, in meters
    :param origin: x and y of the center of the cell in row 0 and column 0, in meters
    :param column_step: x and y from a cell to the one in the next column, in meters
    :param row_step: x and y from a cell to the one in the next row, in meters
    """

    walls: np.ndarray
    cell_size: float
    origin: np.ndarray
    column_step: np.ndarray
    row_step: np.ndarray

    @classmethod
    def find(cls, env: gym.Env) -> "MazeMap | None":
        """
        Read the maze of an env.

        :param env: An env of this package or of gymnasium-robotics, wrapped or not
        :return: The map of its maze, None if it has none
        """
        scene = env.unwrapped.task.scene if isinstance(env.unwrapped, GoalEnv) else None
        if isinstance(scene, Maze):
            walls = np.ones(scene.layout.shape, dtype=bool)
            walls[tuple(scene.layout.free.T)] = False
            row_step, column_step = scene.cell_size * np.eye(2)
            return cls(walls, scene.cell_size, np.zeros(2), column_step, row_step)
        maze = getattr(env.unwrapped, "maze", None)
        if maze is None:
            return None
        origin, next_column, next_row = (np.asarray(maze.cell_rowcol_to_xy(cell)) for cell in ((0, 0), (0, 1), (1, 0)))
        walls = np.array([[cell == 1 for cell in row] for row in maze.maze_map])
        return cls(walls, float(maze.maze_size_scaling), origin, next_column - origin, next_row - origin)

    @classmethod
    def from_env(cls, env: gym.Env) -> "MazeMap":
        """
        Read the maze of an env that must have one.

        :param env: A maze of this package or of gymnasium-robotics, wrapped or not
        :return: Its map
        :raises ValueError: if the env has no maze
        """
        if not isinstance(env, gym.Env):
            raise ValueError(f"A value map needs a single env, not a {type(env).__name__}: make one with `gym.make()`")
        if (maze := cls.find(env)) is None:
            raise ValueError(f"{env} has no maze to draw: value maps need a maze env such as PointMaze_UMaze-v3")
        return maze

    def positions(self, cells: np.ndarray) -> np.ndarray:
        """
        Find places by rows and columns.

        :param cells: Rows and columns, may be fractions, shape ``(..., 2)``
        :return: x and y in meters, same shape
        """
        return self.origin + cells @ np.stack([self.row_step, self.column_step])

    def cells(self, xy: np.ndarray) -> np.ndarray:
        """
        Find rows and columns of places.

        :param xy: Positions in meters, shape ``(..., 2)``
        :return: Row and column of each as fractions, same shape
        """
        return (np.asarray(xy) - self.origin) @ np.linalg.inv(np.stack([self.row_step, self.column_step]))

    def places(self, points_per_cell: int = 1) -> np.ndarray:
        """
        Spread points evenly over all free cells.

        :param points_per_cell: Number of points along the side of a cell
        :return: x and y of the points in meters, shape ``(n, 2)``
        """
        shifts = (np.arange(points_per_cell) + 0.5) / points_per_cell - 0.5
        grid = np.stack(np.meshgrid(shifts, shifts, indexing="ij"), axis=-1).reshape(-1, 2)
        return self.positions(np.argwhere(~self.walls)[:, None] + grid).reshape(-1, 2)

    def is_wall(self, xy: np.ndarray) -> np.ndarray:
        """
        Find out which places are not free.

        :param xy: Positions in meters, shape ``(..., 2)``
        :return: Whether each lies in a wall or outside of the maze, shape ``(...)``
        """
        cells = np.rint(self.cells(xy)).astype(int)
        inside = ((cells >= 0) & (cells < self.walls.shape)).all(axis=-1)
        rows, columns = np.moveaxis(np.clip(cells, 0, np.array(self.walls.shape) - 1), -1, 0)
        return ~inside | self.walls[rows, columns]

    def limits(self) -> tuple[float, float, float, float]:
        """
        Measure the maze.

        :return: Smallest and largest x, smallest and largest y, in meters
        """
        corners = self.positions(np.array([np.zeros(2), self.walls.shape]) - 0.5)
        (x_min, y_min), (x_max, y_max) = corners.min(axis=0), corners.max(axis=0)
        return x_min, x_max, y_min, y_max

    def to_picture(self, xy: np.ndarray) -> np.ndarray:
        """
        Turn places so that a picture reads as the maze's text does.

        :param xy: Positions or directions in meters, shape ``(..., 2)``
        :return: The same with the coordinate first that runs along the rows of the maze, from left to right in a picture
        """
        return np.asarray(xy)[..., ::-1] if self.column_step[0] == 0 else np.asarray(xy)

    def draw(self, ax: "Axes") -> None:
        """
        Draw the walls, so that the picture reads as the maze's text does: rows from top to bottom.

        :param ax: Where
        """
        from matplotlib.patches import Rectangle

        for center in self.to_picture(self.positions(np.argwhere(self.walls))):
            corner = center - self.cell_size / 2
            ax.add_patch(Rectangle(corner, self.cell_size, self.cell_size, facecolor="0.25", edgecolor="0.25"))
        x_min, x_max, y_min, y_max = self.limits()
        (left, bottom), (right, top) = self.to_picture(np.array([(x_min, y_min), (x_max, y_max)]))
        across, up = self.to_picture(np.array(["x", "y"]))
        ax.set(xlabel=f"{across} (m)", ylabel=f"{up} (m)", aspect="equal", xlim=(left, right), ylim=(bottom, top))
        if self.to_picture(self.row_step)[1] > 0:
            ax.invert_yaxis()

    def distances(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """
        Length of the shortest way of a point through the maze. It is exact: such a way is straight but where it turns at
        a corner of a wall, so it leads along lines of sight between its ends and corners.

        :param sources: Positions in meters, shape ``(n_sources, 2)``
        :param targets: Positions in meters, shape ``(n_targets, 2)``
        :return: Lengths in meters, shape ``(n_sources, n_targets)``; infinite where no way leads
        """
        from scipy.sparse.csgraph import floyd_warshall

        first, last = self.cells(sources), self.cells(targets)
        # Corners around which a way can turn have one wall around them
        walls = np.pad(self.walls, 1, constant_values=True).astype(int)
        corners = np.argwhere(walls[:-1, :-1] + walls[1:, :-1] + walls[:-1, 1:] + walls[1:, 1:] == 1) - 0.5
        lengths = self._lengths_in_sight(first, last)
        if len(corners):
            between = floyd_warshall(self._lengths_in_sight(corners, corners))
            to_target = (between[:, :, None] + self._lengths_in_sight(corners, last)).min(axis=1)
            for from_source, rest in zip(self._lengths_in_sight(first, corners).T, to_target, strict=True):
                lengths = np.minimum(lengths, from_source[:, None] + rest)
        return lengths * self.cell_size

    def _obstacles(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Smallest and largest row and column of boxes that no line of sight passes."""
        boxes: list[tuple[np.ndarray, np.ndarray]] = []
        # Rows and columns of walls, so that there is no way between two neighbors
        for along, walls in ((1, self.walls), (0, self.walls.T)):
            edges = np.diff(np.pad(walls, ((0, 0), (1, 1))).astype(int), axis=1)
            for (line, start), (_, end) in zip(np.argwhere(edges == 1), np.argwhere(edges == -1), strict=True):
                low, high = np.array([line - 0.5, start - 0.5]) + TOUCH, np.array([line + 0.5, end - 0.5]) - TOUCH
                boxes.append((low, high) if along else (low[::-1], high[::-1]))
        # Nor between two that touch at a corner
        walls = self.walls
        falling = walls[:-1, :-1] & walls[1:, 1:] & ~walls[1:, :-1] & ~walls[:-1, 1:]
        rising = ~walls[:-1, :-1] & ~walls[1:, 1:] & walls[1:, :-1] & walls[:-1, 1:]
        boxes += [(corner + 0.5 - 2 * TOUCH, corner + 0.5 + 2 * TOUCH) for corner in np.argwhere(falling | rising)]
        return boxes

    def _lengths_in_sight(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Lengths of straight lines in cells, shape ``(n_first, n_last)``; infinite where a wall is in the way."""
        steps = last[None] - first[:, None]
        lengths = np.hypot(steps[..., 0], steps[..., 1])
        # Lines along an axis, which never meet the sides of a box that run along it, meet them far away instead
        divisors = np.where(np.abs(steps) < 1e-12, 1e-12, steps)
        for low, high in self._obstacles():
            meets_low, meets_high = (low - first)[:, None] / divisors, (high - first)[:, None] / divisors
            enters = np.minimum(meets_low, meets_high).max(axis=-1)
            leaves = np.maximum(meets_low, meets_high).min(axis=-1)
            lengths[np.maximum(enters, 0) < np.minimum(leaves, 1)] = np.inf
        return lengths


def goals_of(env: gym.Env) -> np.ndarray:
    """
    Find the goals of a maze.

    :param env: A maze of this package or of gymnasium-robotics, wrapped or not
    :return: x and y of all goals that it may set, but for noise, in meters, shape ``(n, 2)``
    """
    scene = env.unwrapped.task.scene if isinstance(env.unwrapped, GoalEnv) else None
    if isinstance(scene, Maze):
        return np.unique(scene.pairs[:, 1], axis=0) * scene.cell_size
    return np.unique(env.unwrapped.maze.unique_goal_locations, axis=0)  # type: ignore[attr-defined]
