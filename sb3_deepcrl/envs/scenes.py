import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import mujoco
import numpy as np

from sb3_deepcrl.envs.layouts import Layout

BOX = mujoco.mjtGeom.mjGEOM_BOX
WALL_COLOR = (0.7, 0.5, 0.3, 1.0)


class Scene(ABC):
    """
    Where a robot acts: the fixed geometry, and the law by which starts and goals are drawn.

    Each draw consumes ``n_uniform`` numbers in [0, 1) and is a pure function of them, row by row. This is what makes an
    environment's episodes independent of how many others are drawn with it.
    """

    #: Numbers that one draw of start and goal consumes
    n_uniform: int
    #: Corner points (x, y) of the rectangle that a top-down picture shows, in meters
    bounds: tuple[tuple[float, float], tuple[float, float]]
    #: Whether a drawn start is exact, i.e. gets none of the robot's start noise
    exact_start: bool = False

    @abstractmethod
    def build(self, spec: mujoco.MjSpec) -> None:
        """Add the scene's geometry to a robot's model."""

    @abstractmethod
    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Starts of shape (n, 2) and goals of shape (n, goal_dim) in meters, by numbers in [0, 1), shape (n, n_uniform)."""

    def next_goals(self, uniform: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Draw goals for robots that reached these, shape (n, goal_dim), by numbers in [0, 1), shape (n, n_uniform)."""
        return self.draw(uniform)[1]

    # An open floor accepts every start and goal
    def check(self, start: np.ndarray | None, goal: np.ndarray | None, radius: float) -> None:  # noqa: B027
        """Refuse a given start or goal in meters (None: drawn) where a robot cannot be that needs a distance to walls."""

    def check_way(self, start: np.ndarray | None, goal: np.ndarray | None) -> None:  # noqa: B027
        """Refuse a start and a goal between which there is no way."""


class Maze(Scene):
    """
    A maze: starts and goals are the centers of its cells, drawn from a table of pairs with a probability each.

    Arguments are those of :class:`~sb3_deepcrl.envs.task.GoalTask`; ``goal_tail`` are the constant coordinates of a goal
    behind x and y. The default height of the walls is the released code's: 2 m for the ant, 1 m for the humanoid.
    """

    n_uniform = 1

    def __init__(
        self,
        layout: Layout,
        cell_size: float,
        wall_height: float | None = None,
        goal_set: str = "train",
        stitching: int | None = None,
        goal_tail: Sequence[float] = (),
        random_start: bool = False,
    ):
        self.layout = layout
        self.cell_size = cell_size
        self.wall_height = cell_size / 2 if wall_height is None else wall_height
        self.stitching = stitching
        self.exact_start = stitching is not None
        n_rows, n_columns = layout.shape
        self.bounds = ((-cell_size / 2, -cell_size / 2), ((n_rows - 0.5) * cell_size, (n_columns - 0.5) * cell_size))
        if stitching is not None and goal_set == "train":
            self.pairs, probabilities = layout.training_pairs(stitching)
        else:
            goals = layout.goals if goal_set == "train" else layout.eval_goals
            if stitching is not None:
                goals = layout.far_goals(stitching)
            starts = layout.free if random_start else layout.starts
            # Only a random start can be the goal itself, or be cut off from it
            ways = [(start, layout.distances(start)) for start in starts]
            self.pairs = np.array([(start, goal) for start, steps in ways for goal in goals if steps[tuple(goal)] > 0])
            probabilities = np.full(len(self.pairs), 1 / len(self.pairs))
        self._cumulative = np.cumsum(probabilities)
        positions = self.pairs * cell_size
        self._starts = positions[:, 0].astype(np.float64)
        self._goals = np.hstack((positions[:, 1], np.tile(goal_tail, (len(positions), 1))))
        self._all_goals = np.unique(self._goals, axis=0)
        self._other_goals: dict[tuple[int, int], np.ndarray] = {}

    def build(self, spec: mujoco.MjSpec) -> None:
        size = self.cell_size
        for row, column, n_rows, n_columns in self.layout.wall_boxes():
            # Everything is set, as a new geom inherits the robot's defaults
            middle = [(row + (n_rows - 1) / 2) * size, (column + (n_columns - 1) / 2) * size, self.wall_height / 2]
            half = [n_rows * size / 2, n_columns * size / 2, self.wall_height / 2]
            wall = spec.worldbody.add_geom(name=f"wall_{row}_{column}", type=BOX, pos=middle, size=half)
            wall.contype, wall.conaffinity, wall.condim, wall.margin = 1, 1, 3, 0
            wall.friction, wall.material, wall.rgba = [1, 0.5, 0.5], "", WALL_COLOR

    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Rounding may leave the last cumulative probability just below one
        index = np.minimum(np.searchsorted(self._cumulative, uniform[:, 0], side="right"), len(self.pairs) - 1)
        return self._starts[index], self._goals[index]

    def next_goals(self, uniform: np.ndarray, goals: np.ndarray) -> np.ndarray:
        # Any other goal to which a way leads, each equally likely; the only one stays where it is
        next_goals = goals.copy()
        for i, goal in enumerate(goals):
            others = self.goals_from(self.cell_of(goal))
            if len(others) > 0:
                next_goals[i] = others[int(uniform[i, 0] * len(others))]
        return next_goals

    def goals_from(self, cell: tuple[int, int]) -> np.ndarray:
        """Goals that can be reached from a cell, but for the cell itself, shape (n, goal_dim)."""
        if cell not in self._other_goals:
            steps = self.layout.distances(cell)
            self._other_goals[cell] = np.array([goal for goal in self._all_goals if steps[self.cell_of(goal)] > 0])
        return self._other_goals[cell]

    def cell_of(self, position: np.ndarray) -> tuple[int, int]:
        """Row and column of the cell around x and y in meters (further coordinates are ignored)."""
        row, column = np.floor(np.asarray(position)[:2] / self.cell_size + 0.5).astype(int)
        return int(row), int(column)

    def check(self, start: np.ndarray | None, goal: np.ndarray | None, radius: float) -> None:
        for kind, position in (("start", start), ("goal", goal)):
            if position is not None and self.layout.is_wall(*self.cell_of(position)):
                row, column = self.cell_of(position)
                raise ValueError(
                    f"The {kind} {position.tolist()} lies in the wall at row {row}, column {column} of maze "
                    f"{self.layout.name!r}. Cell (i, j) spans {self.cell_size} m around x = {self.cell_size} i, "
                    f"y = {self.cell_size} j: choose a free cell."
                )
        if start is None:
            return
        row, column = self.cell_of(start)
        for i in range(row - 1, row + 2):
            for j in range(column - 1, column + 2):
                outside = np.abs(start - np.array([i, j]) * self.cell_size) - self.cell_size / 2
                distance = math.hypot(*np.maximum(outside, 0))
                if self.layout.is_wall(i, j) and distance < radius:
                    raise ValueError(
                        f"The start {start.tolist()} is {distance:.3f} m from the wall at row {i}, column {j}, but the "
                        f"robot needs {radius} m. The center of the cell in row {row}, column {column} is at "
                        f"{[row * self.cell_size, column * self.cell_size]}."
                    )

    def check_way(self, start: np.ndarray | None, goal: np.ndarray | None) -> None:
        if start is None and goal is None:
            return
        if start is not None and self.layout.is_wall(*self.cell_of(start)):
            # No episode has started, or the robot is on a wall
            start = None
        # All drawn starts and goals are connected, so one of them stands for all
        first = tuple(self.pairs[0, 0].tolist()) if start is None else self.cell_of(start)
        last = tuple(self.pairs[0, 1].tolist()) if goal is None else self.cell_of(goal)
        if self.layout.distances(first)[last] < 0:
            raise ValueError(
                f"No way leads from the {'drawn' if start is None else 'given'} start in row {first[0]}, column {first[1]} to "
                f"the {'drawn' if goal is None else 'given'} goal in row {last[0]}, column {last[1]} of maze "
                f"{self.layout.name!r}. Choose both in one part of the maze, or open a way in its text."
            )


class OpenField(Scene):
    """
    An open floor: the start is the origin, the goal lies in any direction, at a distance in meters drawn uniformly.
    """

    n_uniform = 2

    def __init__(self, distance: tuple[float, float], goal_tail: Sequence[float] = ()):
        self.distance = distance
        self.goal_tail = tuple(goal_tail)
        reach = distance[1] + 1
        self.bounds = ((-reach, -reach), (reach, reach))

    def build(self, spec: mujoco.MjSpec) -> None:
        """Nothing is added: the robots' models come with a floor."""

    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.distance
        # math instead of NumPy: its vectorized sine may round differently for batches of different sizes
        goals = [
            (r * math.cos(angle), r * math.sin(angle), *self.goal_tail)
            for r, angle in ((low + (high - low) * u, 2 * math.pi * v) for u, v in uniform.tolist())
        ]
        return np.zeros((len(uniform), 2)), np.array(goals)


# Squares where the cube starts and where its goals lie: x and y of the middle, and half the side, in meters
TABLES = {
    "push_easy": (((-0.1, 0.6), 0.1), ((0.1, 0.6), 0.1)),
    "push_hard": (((-0.25, 0.65), 0.25), ((0.25, 0.65), 0.25)),
    "binpick_hard": (((-0.3, 0.6), 0.15), ((0.3, 0.6), 0.15)),
}
# Half the inner side of a bin, half its height and half the thickness of its walls, in meters
BIN_HALF, BIN_HALF_HEIGHT, BIN_HALF_THICKNESS = 0.19, 0.033, 0.005
# Greatest height of a goal above the table in meters
MAX_GOAL_HEIGHT = 1.0


class Table(Scene):
    """
    The arm's table: the cube starts in one square and its goals lie in a second one, where the cube lies flat. Colored tiles
    mark the squares; in the bin-picking task they are bins with walls.
    """

    bounds = ((-0.7, -0.2), (0.7, 1.1))
    n_uniform = 4
    # Nothing but the cube has a start position, and it gets no noise
    exact_start = True

    def __init__(self, name: str, goal_tail: Sequence[float]):
        self.name = name
        self.squares = TABLES[name]
        self.goal_tail = tuple(goal_tail)

    def build(self, spec: mujoco.MjSpec) -> None:
        colors = ([0.2, 0.4, 0.8, 1], [0.8, 0.3, 0.2, 1])
        for label, color, (center, half) in zip(("start", "goal"), colors, self.squares, strict=True):
            body = spec.worldbody.add_body(name=f"{label}_square", pos=[*center, 0])
            if self.name != "binpick_hard":
                body.add_geom(type=BOX, pos=[0, 0, 0.0005], size=[half, half, 0.0005], rgba=color)
                continue
            spec.option.impratio = 10
            across = [BIN_HALF + BIN_HALF_THICKNESS, BIN_HALF_THICKNESS, BIN_HALF_HEIGHT]
            along = [BIN_HALF_THICKNESS, BIN_HALF - BIN_HALF_THICKNESS, BIN_HALF_HEIGHT]
            walls = ((0, -BIN_HALF, across), (0, BIN_HALF, across), (-BIN_HALF, 0, along), (BIN_HALF, 0, along))
            for i, (x, y, size) in enumerate(walls):
                wall = f"{label}_bin{i}"
                body.add_geom(name=wall, type=BOX, pos=[x, y, BIN_HALF_HEIGHT], size=size, rgba=color)
                for other in ("cube", "hand", "left_finger", "right_finger"):
                    spec.add_pair(geomname1=wall, geomname2=other)

    def check(self, start: np.ndarray | None, goal: np.ndarray | None, radius: float) -> None:
        (low_x, low_y), (high_x, high_y) = self.bounds
        for kind, point in (("start", start), ("goal", goal)):
            if point is not None and not (low_x <= point[0] <= high_x and low_y <= point[1] <= high_y):
                raise ValueError(
                    f"The {kind} {point.tolist()} is out of the arm's reach: choose x from {low_x} to {high_x} and "
                    f"y from {low_y} to {high_y}."
                )
        if goal is not None and not 0 <= goal[2] <= MAX_GOAL_HEIGHT:
            raise ValueError(
                f"The goal {goal.tolist()} lies below the table or above the arm's reach: choose z from 0 to "
                f"{MAX_GOAL_HEIGHT}. A cube that lies flat on the table has z = {self.goal_tail[0]}."
            )

    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start, goal = (
            np.array(center) + half * (2 * uniform[:, 2 * i : 2 * i + 2] - 1) for i, (center, half) in enumerate(self.squares)
        )
        return start, np.hstack((goal, np.tile(self.goal_tail, (len(goal), 1))))
