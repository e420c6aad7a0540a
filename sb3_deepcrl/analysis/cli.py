"""
The command ``python -m sb3_deepcrl.analysis``.
"""

import argparse
import ast
import signal
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markdown import Markdown

from sb3_deepcrl.analysis.ablation import AblationStudy
from sb3_deepcrl.analysis.baselines import BaselinesStudy
from sb3_deepcrl.analysis.collector import CollectorStudy
from sb3_deepcrl.analysis.depth import DepthStudy
from sb3_deepcrl.analysis.grid import GridStudy
from sb3_deepcrl.analysis.representation import RepresentationStudy
from sb3_deepcrl.analysis.scale import ScaleStudy
from sb3_deepcrl.analysis.stitching import StitchingStudy
from sb3_deepcrl.analysis.study import Study
from sb3_deepcrl.analysis.value_study import ValueMapStudy
from sb3_deepcrl.analysis.walk import WalkStudy
from sb3_deepcrl.common.signals import stopped_by_signals
from sb3_deepcrl.common.startup import end_start

STUDIES: dict[str, type[Study]] = {
    study.name: study
    for study in (
        DepthStudy,
        ScaleStudy,
        GridStudy,
        AblationStudy,
        BaselinesStudy,
        ValueMapStudy,
        StitchingStudy,
        RepresentationStudy,
        CollectorStudy,
        WalkStudy,
    )
}


class Parser(argparse.ArgumentParser):
    """
    A parser that says what is wrong in one line.
    """

    def error(self, message: str) -> NoReturn:
        """
        :param message: What is wrong
        """
        self.exit(2, f"{self.prog}: error: {message}\n")


def key_value(text: str) -> tuple[str, Any]:
    """
    :param text: ``key:value``, where the value is a Python literal or else a string
    :return: Key and value
    """
    key, colon, value = text.partition(":")
    if not colon or not key:
        raise argparse.ArgumentTypeError(f"expected key:value, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def add_option(parser: argparse.ArgumentParser, item: "Field[Any]") -> None:
    """
    :param parser: The parser
    :param item: Field of a study
    """
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    kwargs: dict[str, Any] = dict(item.metadata)
    kwargs["help"] += " (default: %(default)s)" if default else ""
    if isinstance(default, dict):
        kwargs.update(type=key_value, nargs="+", metavar="KEY:VALUE")
    elif isinstance(default, tuple):
        kwargs.update(type=float)
    elif isinstance(default, list):
        kwargs.update(type=type(default[0]), nargs="+")
    else:
        kwargs.setdefault("type", type(default))
    parser.add_argument(f"--{item.name.replace('_', '-')}", default=default, **kwargs)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a study.

    :param argv: Arguments, by default those of the command line
    """
    end_start()
    parser = Parser(
        prog="python -m sb3_deepcrl.analysis",
        description="Studies of depth. Each trains what has not been trained yet and writes a report: Markdown, CSV, picture.",
    )
    subparsers = parser.add_subparsers(dest="study", required=True, metavar="study")
    for name, study_class in STUDIES.items():
        subparser = subparsers.add_parser(name, help=study_class.summary, description=study_class.__doc__)
        for item in fields(study_class):
            add_option(subparser, item)
        subparser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of all runs (default: %(default)s)")
        subparser.add_argument(
            "--output",
            type=Path,
            help="Markdown file to write (default: in the folder of the runs, named after study and env)",
        )
        subparser.add_argument("--jobs", type=int, help="Number of runs side by side (default: the number of cores)")
    args = vars(parser.parse_args(argv))
    study_class = STUDIES[args.pop("study")]
    runs, output, jobs = args.pop("runs"), args.pop("output"), args.pop("jobs")
    console = Console()
    numbers: list[int] = []
    try:
        # Pairs from the command line become a dict
        settings: dict[str, Any] = {name: dict(value) if _is_pairs(value) else value for name, value in args.items()}
        study = study_class(**settings)
        if jobs is not None and jobs < 1:
            raise ValueError(f"`jobs` must be at least 1, got {jobs}")
        with stopped_by_signals() as numbers:
            report = study.run(runs, output, jobs, console)
    except (ValueError, ChildProcessError) as error:
        # What comes from the process of a run has its traceback as its cause
        cause = f"{error.__cause__}\n" if isinstance(error.__cause__, RuntimeError) else ""
        parser.exit(2, f"{cause}{parser.prog} {study_class.name}: error: {error}\n")
    except KeyboardInterrupt:
        code = 128 + (numbers[0] if numbers else signal.SIGINT)
        parser.exit(code, "Stopped. The same command goes on from the last evaluations.\n")
    except Exception as error:
        error.add_note("The same command goes on from the last evaluations.")
        raise
    assert report.path is not None
    console.print(Markdown(report.path.read_text()))
    console.print(f"Written to {report.path}")


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], tuple)
