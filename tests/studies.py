"""
What the tests of the studies share.
"""

import csv
from pathlib import Path

from PIL import Image

from sb3_deepcrl.analysis.cli import main

# Every step is at the goal
STEPS = 20
TOY = [
    *("--steps", "320", "--n-evaluations", "2", "--n-eval-episodes", "4", "--n-envs", "4", "--batch-size", "8"),
    *("--env-kwargs", f"max_episode_steps:{STEPS}", "success_threshold:100.0", "--jobs", "1"),
]


def run_study(tmp_path: Path, study: str, *options: str) -> tuple[list[dict[str, str]], str]:
    """
    :param tmp_path: Folder of runs and report
    :param study: Name of a study
    :param options: Options of the command line
    :return: Rows of the CSV file and text of the report
    """
    path = tmp_path / "report.md"
    main([study, *TOY, *options, "--runs", str(tmp_path / "runs"), "--output", str(path)])
    with Image.open(path.with_suffix(".png")) as picture:
        # Not the same color everywhere
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 0
    with path.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file)), path.read_text()


def results_of_scores(scores: dict[str, list[float]], n_evaluations: int = 6) -> dict[str, list[list[dict[str, str]]]]:
    """
    :param scores: Time at goal of each seed, by setting
    :param n_evaluations: Number of evaluations, all the same but for the first one, which is 0
    :return: Evaluations of each seed by setting
    """

    def row(index: int, score: float) -> dict[str, str]:
        measures = {"time_at_goal": score if index else 0.0, "success_any": float(index > 0)}
        time = {"timesteps": 100 * (index + 1), "updates": 10 * (index + 1), "seconds": 2.0 * (index + 1)}
        return {name: str(value) for name, value in {**time, **measures}.items()}

    return {
        label: [[row(index, score) for index in range(n_evaluations)] for score in seeds] for label, seeds in scores.items()
    }


def table_of(text: str) -> list[dict[str, str]]:
    """
    :param text: A report
    :return: Rows of its table
    """
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|")
    return [dict(zip(header, row, strict=True)) for row in rows]
