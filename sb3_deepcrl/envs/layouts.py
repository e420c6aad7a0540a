"""
Mazes as text.

A maze is a list of strings, one string a row:

==== ==================================================================
``#`` wall
``.`` free cell that is never a goal
``r`` start cell (several are allowed, each is drawn equally often)
``g`` goal cell of the training set
``G`` goal cell of the training set and of the evaluation set
==== ==================================================================

The center of the cell in row ``i`` and column ``j`` lies at ``x = i * cell_size``, ``y = j * cell_size``,
the convention of the paper's mazes. Pictures of a maze (``plot_maze`` and the top-down camera) show it as the text reads:
rows run down, columns run to the right.

The grids, their starts and both goal sets are those of the code released with the paper (https://arxiv.org/abs/2503.14858).
"""

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Longest side of a box of walls in cells: 2 was faster than 1, 3 and no limit, for ant and humanoid
MAX_BOX_CELLS = 2
WALL, FREE, START, GOAL, EVAL_GOAL = "#", ".", "r", "g", "G"
CELLS = {WALL: "wall", FREE: "free", START: "start", GOAL: "training goal", EVAL_GOAL: "training and evaluation goal"}

# Names, and below them the rows. The humanoid's evaluation set of "big" has one goal more: row 2, column 5. No evaluation set
# of "hardest" exists: the paper trains and evaluates on the same goals.
TEXT = """
u      u2      u3
#####  ######  #######
#rgg#  #rggg#  #rgggg#
###g#  ####g#  #####g#
#GGG#  #GGGG#  #GGGGG#
#####  ######  #######

u4     u5        u6       u7
#####  ########  #######  ######
#ggg#  #gggggg#  #ggggg#  #gggg#
#r#g#  #r####g#  #r###g#  #r##g#
###g#  ######g#  #####g#  ####g#
#G#g#  #G####G#  #G###G#  #G##G#
#GGG#  #GGGGGG#  #GGGGG#  #GGGG#
#####  ########  #######  ######

big       big_humanoid
########  ########
#rg##GG#  #rg##GG#
#gg#ggG#  #gg#gGG#
##ggg###  ##ggg###
#gg#ggg#  #gg#ggg#
#g#Gg#G#  #g#Gg#G#
#gGG#GG#  #gGG#GG#
########  ########

hardest
############
#rggg#ggggg#
#g##g#g#g#g#
#gggggg#ggg#
#g####g###g#
#gg#g#ggggg#
##g#g#g#g###
#gg#ggg#ggg#
############
"""
LAYOUTS: dict[str, tuple[str, ...]] = {
    name: tuple(rows)
    for block in TEXT.strip().split("\n\n")
    for name, *rows in zip(*map(str.split, block.splitlines()), strict=True)
}


@dataclass(frozen=True)
class Layout:
    """
    A checked maze, made by :func:`make_layout`. ``name`` is its key in ``LAYOUTS``, or "custom".
    """

    name: str
    rows: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_text(self.name, self.rows)
        for start in self.starts:
            distances = self.distances(start)
            for row, column in self.goals:
                if distances[row, column] < 0:
                    raise ValueError(
                        f"Maze {self.name!r}: the goal at row {row}, column {column} cannot be reached from the start at "
                        f"row {start[0]}, column {start[1]}. Open a way ({FREE!r}) or remove the goal."
                    )

    @cached_property
    def starts(self) -> np.ndarray:
        """Row and column of each start cell, shape (n, 2)."""
        return self.cells(START)

    @cached_property
    def goals(self) -> np.ndarray:
        """Row and column of each goal cell of the training set, shape (n, 2)."""
        return self.cells(GOAL + EVAL_GOAL)

    @cached_property
    def eval_goals(self) -> np.ndarray:
        """The same of the evaluation set, which is the training set in a maze without one of its own."""
        goals = self.cells(EVAL_GOAL)
        return goals if len(goals) else self.goals

    @cached_property
    def free(self) -> np.ndarray:
        """Row and column of each cell that is no wall, shape (n, 2)."""
        return self.cells(FREE + START + GOAL + EVAL_GOAL)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return len(self.rows), len(self.rows[0])

    @cached_property
    def walls(self) -> np.ndarray:
        """Whether each cell is a wall, shape (rows, columns)."""
        return np.array([[kind == WALL for kind in row] for row in self.rows])

    def is_wall(self, row: int, column: int) -> bool:
        """Whether a cell is a wall, as everything outside of the maze is."""
        n_rows, n_columns = self.shape
        return not (0 <= row < n_rows and 0 <= column < n_columns) or self.rows[row][column] == WALL

    def cells(self, kinds: str) -> np.ndarray:
        """Row and column of every cell with one of these characters, in reading order, shape (n, 2)."""
        found = [(i, j) for i, row in enumerate(self.rows) for j, kind in enumerate(row) if kind in kinds]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def distances(self, cell: Sequence[int] | np.ndarray) -> np.ndarray:
        """Steps on the shortest way from a cell (row, column) to each, shape (rows, columns); -1 where no way leads."""
        steps = np.full(self.shape, -1, dtype=np.int64)
        steps[cell[0], cell[1]] = 0
        queue = deque([(int(cell[0]), int(cell[1]))])
        while queue:
            row, column = queue.popleft()
            for neighbor in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if not self.is_wall(*neighbor) and steps[neighbor] < 0:
                    steps[neighbor] = steps[row, column] + 1
                    queue.append(neighbor)
        return steps

    def wall_boxes(self) -> list[tuple[int, int, int, int]]:
        """
        Cover the walls with few small rectangles. Every box costs the collision detection time, so neighboring wall cells are
        merged, first along rows, then equal runs of neighboring rows; but MuJoCo rejects far boxes by their bounding
        sphere, which is wide around a long box, so none is longer than ``MAX_BOX_CELLS``.

        :return: First row, first column, number of rows and number of columns of each rectangle
        """
        finished: list[tuple[int, int, int, int]] = []
        # (first column, number of columns) -> (first row, number of rows) of the runs that reach into the last row
        growing: dict[tuple[int, int], tuple[int, int]] = {}
        for i, row in enumerate(self.rows):
            runs = [(match.start(), len(match[0])) for match in re.finditer(f"{WALL}{{1,{MAX_BOX_CELLS}}}", row)]
            for run in [run for run in growing if run not in runs or growing[run][1] == MAX_BOX_CELLS]:
                first, height = growing.pop(run)
                finished.append((first, run[0], height, run[1]))
            for run in runs:
                first, height = growing.get(run, (i, 0))
                growing[run] = (first, height + 1)
        return finished + [(first, run[0], height, run[1]) for run, (first, height) in growing.items()]

    def training_pairs(self, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Start and goal cells of the stitching study (figure 11 of the paper): all pairs at most ``max_distance`` cells apart
        that lead away from the start cell, i.e. the first cell lies on a shortest way from the start to the second one.
        Every distance is equally likely, and so is every pair of one distance. Gives the pairs, shape (n, 2, 2) (start or
        goal, row or column), and their probabilities, shape (n,).
        """
        from_origin = self._distances_from_start()
        cells = [cell for cell in self.free if from_origin[tuple(cell)] >= 0]
        pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {k: [] for k in range(1, max_distance + 1)}
        for first in cells:
            from_first = self.distances(first)
            for second in cells:
                steps = int(from_first[tuple(second)])
                if steps in pairs and from_origin[tuple(first)] + steps == from_origin[tuple(second)]:
                    pairs[steps].append((first, second))
        for steps, found in pairs.items():
            if not found:
                raise ValueError(
                    f"Maze {self.name!r}: no two cells are {steps} cells apart, so stitching={max_distance} cannot be built. "
                    f"The farthest cell is {int(from_origin.max())} cells from the start: choose a smaller number."
                )
        chosen = np.array([pair for found in pairs.values() for pair in found])
        weights = np.concatenate([np.full(len(found), 1 / len(found) / max_distance) for found in pairs.values()])
        return chosen, weights

    def far_goals(self, min_distance: int) -> np.ndarray:
        """Goals of the stitching evaluation: cells more than this number of steps from the start, shape (n, 2)."""
        from_origin = self._distances_from_start()
        far = np.argwhere(from_origin > min_distance)
        if not len(far):
            raise ValueError(
                f"Maze {self.name!r}: no cell is more than {min_distance} cells from the start, so stitching={min_distance} "
                f"leaves nothing to evaluate on. Choose a number below {int(from_origin.max())}."
            )
        return far

    def _distances_from_start(self) -> np.ndarray:
        if len(self.starts) != 1:
            raise ValueError(
                f"Maze {self.name!r} has {len(self.starts)} start cells, but stitching measures distances from one: "
                f"keep a single {START!r}."
            )
        return self.distances(self.starts[0])


def _check_text(name: str, rows: tuple[str, ...]) -> None:
    where = f"Maze {name!r}"
    if not rows or not all(isinstance(row, str) and row for row in rows):
        raise ValueError(f"{where}: expected a list of non-empty strings, one a row, got {rows!r}.")
    for i, row in enumerate(rows):
        if (n := len(row)) != len(rows[0]):
            raise ValueError(f"{where}: row {i} has {n} cells but row 0 has {len(rows[0])}. Give all rows the same length.")
        for j, kind in enumerate(row):
            if kind not in CELLS:
                known = ", ".join(f"{key!r} {meaning}" for key, meaning in CELLS.items())
                raise ValueError(f"{where}: unknown character {kind!r} at row {i}, column {j}. Known characters: {known}.")
            if kind != WALL and (i in (0, len(rows) - 1) or j in (0, len(row) - 1)):
                raise ValueError(
                    f"{where}: the border is open at row {i}, column {j} ({kind!r}). Surround the maze with walls ({WALL!r})."
                )
    text = "".join(rows)
    for kind, characters in (("start", START), ("goal", GOAL + EVAL_GOAL)):
        if not set(characters) & set(text):
            marks = " or ".join(map(repr, characters))
            raise ValueError(f"{where}: no {kind} cell in {len(rows)} rows. Mark at least one cell with {marks}.")


def make_layout(maze: str | Sequence[str] | Layout) -> Layout:
    """
    Read and check a maze.

    :param maze: Name of a maze in ``LAYOUTS`` in small or capital letters, a maze as text (one string a row, or one string
        of several lines, whose indentation is ignored), or a checked layout
    :return: The checked layout
    :raises ValueError: If the name is unknown or the text is no closed maze with a start and a goal
    """
    if isinstance(maze, Layout):
        return maze
    if isinstance(maze, str) and maze.lower() in LAYOUTS:
        return Layout(maze.lower(), LAYOUTS[maze.lower()])
    if not isinstance(maze, Iterable) or (isinstance(maze, str) and "\n" not in maze):
        raise ValueError(
            f"Unknown maze {maze!r}. Known mazes: {', '.join(LAYOUTS)}; or pass a maze as text, a list with one string a row."
        )
    rows = [line.strip() for line in maze.strip().splitlines()] if isinstance(maze, str) else maze
    return Layout("custom", tuple(rows))
