import numpy as np
import pytest

from sb3_deepcrl.envs.layouts import LAYOUTS, make_layout

# rows, columns, start, walls, training goals, evaluation goals, then the longest and the mean way to both kinds of goals
COUNTS = {
    "u": (5, 5, (1, 1), 18, 6, 3, 6, 3.5, 6, 5.0),
    "u2": (5, 6, (1, 1), 21, 8, 4, 8, 4.5, 8, 6.5),
    "u3": (5, 7, (1, 1), 24, 10, 5, 10, 5.5, 10, 8.0),
    "u4": (7, 5, (2, 1), 24, 10, 4, 10, 5.5, 10, 8.5),
    "u5": (7, 8, (2, 1), 39, 16, 8, 16, 8.5, 16, 12.5),
    "u6": (7, 7, (2, 1), 34, 14, 7, 14, 7.5, 14, 11.0),
    "u7": (7, 6, (2, 1), 29, 12, 6, 12, 6.5, 12, 9.5),
    "big": (8, 8, (1, 1), 38, 25, 9, 11, 6.36, 11, 8.89),
    "big_humanoid": (8, 8, (1, 1), 38, 25, 10, 11, 6.36, 11, 8.70),
    "hardest": (9, 12, (1, 1), 62, 45, 45, 15, 9.07, 15, 9.07),
}


def test_every_layout_has_counts():
    assert set(COUNTS) == set(LAYOUTS)


@pytest.mark.parametrize("name", list(COUNTS))
def test_layout_counts(name):
    layout = make_layout(name)
    rows, columns, start, walls, goals, eval_goals, longest, mean, eval_longest, eval_mean = COUNTS[name]
    assert layout.shape == (rows, columns)
    assert [tuple(cell) for cell in layout.starts] == [start]
    assert "".join(layout.rows).count("#") == walls
    assert len(layout.free) + walls == rows * columns
    for cells, count, far, average in (
        (layout.goals, goals, longest, mean),
        (layout.eval_goals, eval_goals, eval_longest, eval_mean),
    ):
        ways = layout.distances(start)[tuple(cells.T)]
        assert (len(cells), ways.max()) == (count, far)
        assert ways.min() > 0
        assert ways.mean() == pytest.approx(average, abs=0.005)


@pytest.mark.parametrize("name", list(COUNTS))
def test_wall_boxes_cover_each_wall_cell_once(name):
    layout = make_layout(name)
    covered = np.zeros(layout.shape, dtype=int)
    for row, column, n_rows, n_columns in layout.wall_boxes():
        covered[row : row + n_rows, column : column + n_columns] += 1
        assert max(n_rows, n_columns) <= 2
    np.testing.assert_array_equal(covered, [[kind == "#" for kind in row] for row in layout.rows])
    assert len(layout.wall_boxes()) < 0.75 * "".join(layout.rows).count("#")


def test_same_walls_as_gymnasium_robotics():
    maps = pytest.importorskip("gymnasium_robotics.envs.maze.maps")
    for name, other in (("u", maps.U_MAZE), ("big", maps.MEDIUM_MAZE), ("hardest", maps.LARGE_MAZE)):
        assert [[kind == "#" for kind in row] for row in make_layout(name).rows] == [
            [cell == 1 for cell in row] for row in other
        ]


def test_stitching_pairs_of_the_u_maze():
    pairs, probabilities = make_layout("u").training_pairs(3)
    path = [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    expected = {(path[i], path[i + k]): 1 / 3 / (7 - k) for k in (1, 2, 3) for i in range(7 - k)}
    found = {(tuple(start), tuple(goal)): p for (start, goal), p in zip(pairs.tolist(), probabilities, strict=True)}
    assert found.keys() == expected.keys()
    assert all(found[pair] == pytest.approx(p) for pair, p in expected.items())
    # 4, 5 and 6 cells from the start: the goals that the paper evaluates on
    assert sorted(map(tuple, make_layout("u").far_goals(3).tolist())) == [(3, 1), (3, 2), (3, 3)]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "big_humanoid"])
def test_stitching_evaluation_is_never_trained(name):
    layout = make_layout(name)
    pairs, probabilities = layout.training_pairs(2)
    assert probabilities.sum() == pytest.approx(1)
    for start, goal in pairs:
        assert 1 <= layout.distances(start)[tuple(goal)] <= 2
    assert (layout.distances(layout.starts[0])[tuple(layout.far_goals(2).T)] > 2).all()


@pytest.mark.parametrize(
    "rows, message",
    [
        (["####", "#gg#", "####"], "no start cell"),
        (["####", "#r.#", "####"], "no goal cell"),
        (["####", "#rx#", "#gg#", "####"], "'x' at row 1, column 2"),
        (["####", "#rg#", "###"], "row 2 has 3 cells but row 0 has 4"),
        (["####", "#rg.", "####"], "open at row 1, column 3"),
        (["#.##", "#rg#", "####"], "open at row 0, column 1"),
        (["#####", "#r#g#", "#####"], "goal at row 1, column 3 cannot be reached"),
        ([], "expected a list of non-empty strings"),
        ([1, 2], "expected a list of non-empty strings"),
    ],
)
def test_bad_text(rows, message):
    with pytest.raises(ValueError, match=message):
        make_layout(rows)


def test_other_spellings():
    assert make_layout("U4") == make_layout("u4")
    text = """
        #####
        #rgG#
        #####
    """
    assert make_layout(text) == make_layout(["#####", "#rgG#", "#####"]) == make_layout(make_layout(text))
    with pytest.raises(ValueError, match="row 2 has 3 cells but row 0 has 4"):
        make_layout("####\n#rg#\n###")


def test_bad_name_and_bad_stitching():
    with pytest.raises(ValueError, match=r"Unknown maze 'V'.*Known mazes: u, u2"):
        make_layout("V")
    with pytest.raises(ValueError, match="no two cells are 7 cells apart"):
        make_layout("u").training_pairs(7)
    with pytest.raises(ValueError, match="no cell is more than 6 cells"):
        make_layout("u").far_goals(6)
    with pytest.raises(ValueError, match="2 start cells"):
        make_layout(["#####", "#rgr#", "#####"]).training_pairs(1)
