import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import mujoco
import numpy as np

from sb3_deepcrl.envs.layouts import Layout

WALL_COLOR = (0.7, 0.5, 0.3, 1.0)


class Scene(ABC):
    """
    Where a robot acts: the fixed geometry, and the law by which starts and goals are drawn.

    Each draw consumes ``n_uniform`` numbers in [0, 1) and is a pure function of them, row by row. This is what makes an
    environment's episodes independent of how many others are drawn with it.
    """

    #: Numbers that one draw of start and goal consumes
    n_uniform: int
    #: Corner points (x, y) of the rectangle that a top-down picture shows, in metres
    bounds: tuple[tuple[float, float], tuple[float, float]]
    #: Whether a drawn start is exact, i.e. gets none of the robot's start noise
    exact_start: bool = False

    @abstractmethod
    def build(self, spec: mujoco.MjSpec) -> None:
        """
        Add the scene's geometry to a robot's model.

        :param spec: The model to edit
        """

    @abstractmethod
    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param uniform: Numbers in [0, 1), shape (n, n_uniform)
        :return: Start positions of shape (n, 2) and goals of shape (n, goal_dim), in metres
        """

    def next_goals(self, uniform: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """
        Draw goals for robots that reached theirs.

        :param uniform: Numbers in [0, 1), shape (n, n_uniform)
        :param goals: The goals that were reached in metres, shape (n, goal_dim)
        :return: The next ones, same shape
        """
        return self.draw(uniform)[1]

    def check(self, start: np.ndarray | None, goal: np.ndarray | None, radius: float, where: str = "") -> None:
        """
        An open floor accepts every start and goal.

        :param start: x and y of a given start in metres
        :param goal: A given goal in metres
        :param radius: Distance to walls that the robot needs, in metres
        :param where: Place for the messages, e.g. the env index
        :raises ValueError: If one of them lies in a wall
        """
        return

    def check_way(self, start: np.ndarray | None, goal: np.ndarray | None, where: str = "") -> None:
        """
        An open floor has a way from everywhere to everywhere.

        :param start: x and y of a given start in metres, None if it is drawn
        :param goal: A given goal in metres, None if it is drawn
        :param where: Place for the messages, e.g. the env index
        :raises ValueError: If no way leads from the start to the goal
        """
        return


class Maze(Scene):
    """
    :param layout: The checked maze
    :param cell_size: Side of a cell in metres
    :param wall_height: Height of the walls in metres
    :param goal_set: "train" or "eval"
    :param stitching: None, or the number k of the stitching study: training pairs are at most k cells apart, evaluation
        goals are more than k cells from the start
    :param goal_tail: Constant coordinates of a goal behind x and y
    :param random_start: Whether every free cell from which a way leads to the goal is a start cell
    """

    def __init__(
        self,
        layout: Layout,
        cell_size: float,
        wall_height: float,
        goal_set: str = "train",
        stitching: int | None = None,
        goal_tail: Sequence[float] = (),
        random_start: bool = False,
    ):
        self.layout = layout
        self.cell_size = cell_size
        self.wall_height = wall_height
        self.stitching = stitching
        self.exact_start = stitching is not None
        n_rows, n_columns = layout.shape
        self.bounds = ((-cell_size / 2, -cell_size / 2), ((n_rows - 0.5) * cell_size, (n_columns - 0.5) * cell_size))
        # The law is a table of (start cell, goal cell) pairs with a probability each
        if stitching is not None and goal_set == "train":
            self.pairs, probabilities = layout.training_pairs(stitching)
        else:
            goals = layout.goals if goal_set == "train" else layout.eval_goals
            if stitching is not None:
                goals = layout.far_goals(stitching)
            starts = layout.free if random_start else layout.starts
            distances = [layout.distances(start) for start in starts]
            # Only a random start can be the goal itself, or be cut off from it
            self.pairs = np.array(
                [
                    (start, goal)
                    for start, steps in zip(starts, distances, strict=True)
                    for goal in goals
                    if steps[tuple(goal)] > 0
                ]
            )
            probabilities = np.full(len(self.pairs), 1 / len(self.pairs))
        self._cumulative = np.cumsum(probabilities)
        positions = self.pairs * cell_size
        self._starts = positions[:, 0].astype(np.float64)
        self._goals = np.hstack((positions[:, 1], np.tile(goal_tail, (len(positions), 1))))
        self._all_goals = np.unique(self._goals, axis=0)
        # Goals that can be reached from a cell, but for the cell itself
        self._other_goals: dict[tuple[int, int], np.ndarray] = {}
        self.n_uniform = 1

    def build(self, spec: mujoco.MjSpec) -> None:
        size = self.cell_size
        for row, column, n_rows, n_columns in self.layout.wall_boxes():
            # Everything is set, as a new geom inherits the robot's defaults
            spec.worldbody.add_geom(
                name=f"wall_{row}_{column}",
                type=mujoco.mjtGeom.mjGEOM_BOX,
                pos=[(row + (n_rows - 1) / 2) * size, (column + (n_columns - 1) / 2) * size, self.wall_height / 2],
                size=[n_rows * size / 2, n_columns * size / 2, self.wall_height / 2],
                contype=1,
                conaffinity=1,
                condim=3,
                margin=0,
                friction=[1, 0.5, 0.5],
                material="",
                rgba=WALL_COLOR,
            )

    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Rounding may leave the last cumulative probability just below one
        index = np.minimum(np.searchsorted(self._cumulative, uniform[:, 0], side="right"), len(self.pairs) - 1)
        return self._starts[index], self._goals[index]

    def next_goals(self, uniform: np.ndarray, goals: np.ndarray) -> np.ndarray:
        # Any other goal to which a way leads, each equally likely; the only one stays where it is
        next_goals = goals.copy()
        for i, goal in enumerate(goals):
            others = self._goals_from(self.cell_of(goal))
            if len(others) > 0:
                next_goals[i] = others[int(uniform[i, 0] * len(others))]
        return next_goals

    def _goals_from(self, cell: tuple[int, int]) -> np.ndarray:
        if cell not in self._other_goals:
            steps = self.layout.distances(cell)
            self._other_goals[cell] = np.array([goal for goal in self._all_goals if steps[self.cell_of(goal)] > 0])
        return self._other_goals[cell]

    def cell_of(self, position: np.ndarray) -> tuple[int, int]:
        """
        :param position: x and y in metres (further coordinates are ignored)
        :return: Row and column of the cell around it
        """
        row, column = np.floor(np.asarray(position)[:2] / self.cell_size + 0.5).astype(int)
        return int(row), int(column)

    def check(self, start: np.ndarray | None, goal: np.ndarray | None, radius: float, where: str = "") -> None:
        if start is not None:
            self._check_cell("start", start, where)
            self._check_clearance(start, radius, where)
        if goal is not None:
            self._check_cell("goal", goal, where)

    def check_way(self, start: np.ndarray | None, goal: np.ndarray | None, where: str = "") -> None:
        if start is None and goal is None:
            return
        # All drawn starts and goals are connected, so one of them stands for all
        first = tuple(self.pairs[0, 0].tolist()) if start is None else self.cell_of(start)
        last = tuple(self.pairs[0, 1].tolist()) if goal is None else self.cell_of(goal)
        if self.layout.distances(first)[last] < 0:
            raise ValueError(
                f"No way leads from the {'drawn' if start is None else 'given'} start in row {first[0]}, column {first[1]} to "
                f"the {'drawn' if goal is None else 'given'} goal in row {last[0]}, column {last[1]}{where} of maze "
                f"{self.layout.name!r}. Choose both in one part of the maze, or open a way in its text."
            )

    def _check_clearance(self, start: np.ndarray, radius: float, where: str) -> None:
        row, column = self.cell_of(start)
        for i in range(row - 1, row + 2):
            for j in range(column - 1, column + 2):
                outside = np.abs(start - np.array([i, j]) * self.cell_size) - self.cell_size / 2
                distance = math.hypot(*np.maximum(outside, 0))
                if self.layout.is_wall(i, j) and distance < radius:
                    raise ValueError(
                        f"The start {start.tolist()}{where} is {distance:.3f} m from the wall at row {i}, column {j}, but the "
                        f"robot needs {radius} m. The centre of the cell in row {row}, column {column} is at "
                        f"{[row * self.cell_size, column * self.cell_size]}."
                    )

    def _check_cell(self, kind: str, position: np.ndarray, where: str) -> None:
        row, column = self.cell_of(position)
        if self.layout.is_wall(row, column):
            raise ValueError(
                f"The {kind} {position.tolist()}{where} lies in the wall at row {row}, column {column} of maze "
                f"{self.layout.name!r}. "
                f"Cell (i, j) spans {self.cell_size} m around x = {self.cell_size} i, y = {self.cell_size} j: "
                "choose a free cell."
            )


class OpenField(Scene):
    """
    An open floor: the start is the origin, the goal lies in any direction, at a distance drawn uniformly.

    :param distance: Smallest and largest distance of a goal from the start in metres
    :param goal_tail: Constant coordinates of a goal behind x and y
    """

    def __init__(self, distance: tuple[float, float], goal_tail: Sequence[float] = ()):
        self.distance = distance
        self.goal_tail = tuple(goal_tail)
        reach = distance[1] + 1
        self.bounds = ((-reach, -reach), (reach, reach))
        self.n_uniform = 2

    def build(self, spec: mujoco.MjSpec) -> None:
        """Nothing is added: the robots' models come with a floor."""

    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.distance
        # math instead of NumPy: its vectorised sine may round differently for batches of different sizes
        goals = [
            (r * math.cos(angle), r * math.sin(angle), *self.goal_tail)
            for r, angle in ((low + (high - low) * u, 2 * math.pi * v) for u, v in uniform.tolist())
        ]
        return np.zeros((len(uniform), 2)), np.array(goals)
