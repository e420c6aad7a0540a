"""
Mazes seen from above: where their walls are, and how long the ways around them.
"""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from matplotlib.axes import Axes

from sb3_deepcrl.envs.goal_env import GoalEnv
from sb3_deepcrl.envs.plotting import draw_walls
from sb3_deepcrl.envs.scenes import Maze

# By how much walls are smaller for a line of sight than they are, in cells, so that it may touch them
TOUCH = 1e-6


@dataclass
class MazeMap:
    """
    Where the walls of a maze are.

    :param walls: Whether each cell is a wall, shape ``(n_rows, n_columns)``
    :param cell_size: Side of a cell, in meters
    :param origin: x and y of the center of the cell in row 0 and column 0, in meters
    :param steps: x and y from a cell to the ones in the next row and in the next column, in meters, shape ``(2, 2)``
    :param goals: x and y of all goals that the env may set, but for noise, in meters, shape ``(n, 2)``
    """

    walls: np.ndarray
    cell_size: float
    origin: np.ndarray
    steps: np.ndarray
    goals: np.ndarray

    @classmethod
    def find(cls, env: gym.Env) -> "MazeMap | None":
        """Read the maze of an env of this package or of gymnasium-robotics, wrapped or not; None if it has none."""
        if isinstance(env.unwrapped, GoalEnv) and isinstance(scene := env.unwrapped.task.scene, Maze):
            goals = np.unique(scene.pairs[:, 1], axis=0) * scene.cell_size
            return cls(scene.layout.walls, scene.cell_size, np.zeros(2), scene.cell_size * np.eye(2), goals)
        if (maze := getattr(env.unwrapped, "maze", None)) is None:
            return None
        origin, *neighbors = (np.asarray(maze.cell_rowcol_to_xy(cell)) for cell in ((0, 0), (1, 0), (0, 1)))
        walls = np.array([[cell == 1 for cell in row] for row in maze.maze_map])
        goals = np.unique(maze.unique_goal_locations, axis=0)
        return cls(walls, float(maze.maze_size_scaling), origin, np.stack(neighbors) - origin, goals)

    @classmethod
    def from_env(cls, env: gym.Env) -> "MazeMap":
        """Read the maze of an env that must have one."""
        if not isinstance(env, gym.Env):
            raise ValueError(f"A value map needs a single env, not a {type(env).__name__}: make one with `gym.make()`")
        if (maze := cls.find(env)) is None:
            raise ValueError(f"{env} has no maze to draw: value maps need a maze env such as PointMaze_UMaze-v3")
        return maze

    def positions(self, cells: np.ndarray) -> np.ndarray:
        """x and y in meters of rows and columns, which may be fractions, shape ``(..., 2)``."""
        return self.origin + cells @ self.steps

    def cells(self, xy: np.ndarray) -> np.ndarray:
        """Rows and columns as fractions of x and y in meters, shape ``(..., 2)``."""
        return (np.asarray(xy) - self.origin) @ np.linalg.inv(self.steps)

    def places(self, points_per_cell: int = 1) -> np.ndarray:
        """x and y of points in meters that are spread evenly over all free cells, shape ``(n, 2)``."""
        shifts = (np.arange(points_per_cell) + 0.5) / points_per_cell - 0.5
        grid = np.stack(np.meshgrid(shifts, shifts, indexing="ij"), axis=-1).reshape(-1, 2)
        return self.positions(np.argwhere(~self.walls)[:, None] + grid).reshape(-1, 2)

    def is_wall(self, xy: np.ndarray) -> np.ndarray:
        """Whether each x and y, ``(..., 2)``, lies in a wall or outside of the maze."""
        cells = np.rint(self.cells(xy)).astype(int)
        inside = ((cells >= 0) & (cells < self.walls.shape)).all(axis=-1)
        rows, columns = np.moveaxis(np.clip(cells, 0, np.array(self.walls.shape) - 1), -1, 0)
        return ~inside | self.walls[rows, columns]

    @property
    def corners(self) -> np.ndarray:
        """x and y of the outer corners of the first and of the last cell in meters, shape ``(2, 2)``."""
        return self.positions(np.array([np.zeros(2), self.walls.shape]) - 0.5)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top edge of a picture that reads as the maze's text does: rows from top to bottom."""
        (left, top), (right, bottom) = self.to_picture(self.corners)
        return left, right, bottom, top

    def to_picture(self, xy: np.ndarray) -> np.ndarray:
        """
        Places or directions ``(..., 2)`` so that a picture reads as the maze's text does: first what runs along its
        rows.
        """
        return np.asarray(xy)[..., ::-1] if self.steps[1, 0] == 0 else np.asarray(xy)

    def draw(self, ax: Axes) -> None:
        """Draw the walls."""
        draw_walls(ax, self.walls, self.extent, tuple(self.to_picture(np.array(["x", "y"]))))

    def distances(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """
        Lengths of the shortest ways of a point in meters, ``(n_sources, n_targets)``, infinite where no way leads. They are
        exact: such a way is straight but where it turns at a corner of a wall, so it leads along lines of sight.
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
