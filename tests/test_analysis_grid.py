import numpy as np
import pytest

from sb3_deepcrl.analysis import DepthStudy, GridStudy
from sb3_deepcrl.analysis.grid import grid_of
from sb3_deepcrl.analysis.statistics import Estimate
from tests.studies import STEPS, results_of_scores, run_study, table_of


def test_rows_are_critics_and_columns_actors():
    estimates = {(actor, critic): Estimate(100 * actor + critic, 0, 0) for actor in (4, 8, 16) for critic in (4, 32)}
    np.testing.assert_array_equal(grid_of(estimates, (4, 8, 16), (4, 32)), [[404, 804, 1604], [432, 832, 1632]])


def test_report_of_known_scores(tmp_path):
    study = GridStudy(actor_depths=[16, 4], critic_depths=[4, 8, 32], seeds=2)
    scores = {f"actor {a}, critic {c}": [float(a + 10 * c), float(a + 10 * c) + 1] for a in (4, 16) for c in (4, 8, 32)}
    # A deeper actor makes the variance larger alone
    scores["actor 16, critic 4"] = [20.0, 70.0]
    report = study.report(results_of_scores(scores), tmp_path)

    assert [row["critic depth"] for row in report.table] == [4, 8, 32]
    assert [row["actor depth 4"].mean for row in report.table] == [44.5, 84.5, 324.5]
    assert [row["actor depth 16"].mean for row in report.table] == [45.0, 96.5, 336.5]
    verdicts = {note.partition(" (")[0]: note.rpartition(", ")[2] for note in report.notes[2:]}
    assert verdicts == {
        "Deeper actor and critic": "higher.",
        "Deeper actor": "intervals overlap.",
        "Deeper critic": "higher.",
    }
    finals = {(row["actor_depth"], row["critic_depth"], row["seed"]): row["time_at_goal"] for row in report.rows}
    assert finals[16, 8, 1] == "97.0" and len(finals) == 12

    ax = report.figure.axes[0]
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "44", (1, 0): "45", (0, 1): "84", (1, 1): "96", (0, 2): "324", (1, 2): "336"}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "16"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["4", "8", "32"]
    assert ax.get_ylim()[0] < ax.get_ylim()[1]  # The deepest critic at the top


def test_one_row_has_one_comparison(tmp_path):
    study = GridStudy(actor_depths=[4, 8], critic_depths=[4], seeds=2)
    report = study.report(results_of_scores({label: [1.0, 2.0] for label in study.settings()}), tmp_path)
    assert [note.partition(" (")[0] for note in report.notes[2:]] == ["Deeper actor"]


def test_runs_are_those_of_the_depth_study():
    settings = GridStudy(actor_depths=[4, 16], critic_depths=[4, 16]).settings()
    depths = DepthStudy(depths=[4, 16], parts=["both", "actor", "critic"]).settings()
    assert settings["actor 4, critic 4"] == depths["depth 4"]
    assert settings["actor 16, critic 16"] == depths["depth 16"]
    assert settings["actor 16, critic 4"] == depths["actor depth 16"]
    assert settings["actor 4, critic 16"] == depths["critic depth 16"]


def test_command(tmp_path):
    options = (
        "--actor-depths",
        "4",
        "8",
        "--critic-depths",
        "4",
        "--seeds",
        "2",
        "--width",
        "8",
        "--hyperparams",
        "learning_starts:80",
    )
    rows, text = run_study(tmp_path, "grid", *options)
    assert table_of(text) == [{"critic depth": "4", **{f"actor depth {d}": "20 (20 to 20)" for d in (4, 8)}}]
    assert {(row["actor_depth"], row["critic_depth"], row["seed"]) for row in rows} == {
        (actor, "4", seed) for actor in ("4", "8") for seed in ("0", "1")
    }
    assert {float(row["time_at_goal"]) for row in rows} == {STEPS}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(actor_depths=[4, 5]), "`actor_depths` must be a positive multiple of 4.*got 5: use 4 or 8"),
        (dict(critic_depths=[4, 4]), "`critic_depths` holds a value twice"),
        (dict(hyperparams={"depth": 8}), "`hyperparams` holds `depth=8`.*use `actor_depths`"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GridStudy(**kwargs)
