"""
The command ``python -m sb3_deepcrl.analysis``.
"""

import argparse
import ast
import signal
import sys
from collections.abc import Callable, Sequence
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
from sb3_deepcrl.common.startup import end_start
from sb3_deepcrl.common.utils import how_to_write, is_for_user, number, stopped_by_signals, whole_number
from sb3_deepcrl.envs.arguments import advice_for

GOES_ON = "The same command goes on from the last evaluations."
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


# How to read values of a type
READERS: dict[type, Callable[[str], Any]] = {int: whole_number, float: number, str: str}


class Values(argparse.Action):
    """
    Several values, with spaces or commas between them.

    :param reader: How to read one of them
    :param choices: What each may be, anything by default
    :param kwargs: Other arguments of ``argparse.Action``
    """

    def __init__(self, reader: Callable[[str], Any], choices: Sequence[str] | None = None, **kwargs: Any):
        super().__init__(nargs="+", metavar=f"{{{','.join(choices)}}}" if choices else None, **kwargs)
        self.reader, self.allowed = reader, choices

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """
        :param parser: The parser
        :param namespace: Where the values go
        :param values: The arguments
        :param option_string: The flag
        """
        texts = [text for value in values for text in value.split(",") if text]
        for text in texts:
            if self.allowed and text not in self.allowed:
                raise argparse.ArgumentError(self, f"invalid choice: {text!r} (choose from {', '.join(self.allowed)})")
        try:
            setattr(namespace, self.dest, list(map(self.reader, texts)))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None


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
        kwargs.update(type=number)
    elif isinstance(default, list):
        kwargs.update(action=Values, reader=READERS[type(default[0])])
    else:
        kwargs["type"] = READERS[kwargs.get("type", type(default))]
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
        subparser.add_argument("--jobs", type=whole_number, help="Number of runs side by side (default: the number of cores)")
        subparser.add_argument(
            "--reuse-other-code",
            action="store_true",
            help="Take runs, and go on with half-done ones, that were made by other code of this package or other defaults",
        )
    argv = sys.argv[1:] if argv is None else list(argv)
    check_study(parser, argv)
    known, unknown = parser.parse_known_args(argv)
    args = vars(known)
    study_class = STUDIES[args.pop("study")]
    prog = f"{parser.prog} {study_class.name}"
    if unknown:
        options = [*(f"--{name.replace('_', '-')}" for name in args), "--help"]
        parser.exit(2, f"{prog}: error: there is no option {unknown[0]!r}. {advice_for(unknown[0], options)}\n")
    how = {name: args.pop(name) for name in ("runs", "output", "jobs", "reuse_other_code")}
    console = Console()
    numbers: list[int] = []
    try:
        # Pairs from the command line become a dict
        settings: dict[str, Any] = {name: dict(value) if _is_pairs(value) else value for name, value in args.items()}
        study = study_class(**settings)
        if how["jobs"] is not None and how["jobs"] < 1:
            raise ValueError(f"`jobs` must be at least 1, got {how['jobs']}")
        with stopped_by_signals() as numbers:
            report = study.run(**how, console=console)
    except KeyboardInterrupt:
        code = 128 + (numbers[0] if numbers else signal.SIGINT)
        parser.exit(code, f"Stopped. {GOES_ON}\n")
    except Exception as error:
        if (advice := how_to_write(error, how.values())) is not None:
            parser.exit(2, f"{prog}: error: {error}: {advice}. {GOES_ON}\n")
        if not is_for_user(error):
            error.add_note(GOES_ON)
            raise
        parser.exit(2, f"{prog}: error: {error}\n")
    assert report.path is not None
    console.print(Markdown(report.path.read_text()))
    console.print(f"Written to {report.path}")


def check_study(parser: Parser, argv: Sequence[str]) -> None:
    """
    :param parser: The parser
    :param argv: Arguments of the command line, of which the first one must be a study
    """
    name = argv[0] if argv else ""
    if name in STUDIES or name in ("-h", "--help"):
        return
    if name and not name.startswith("-"):
        parser.error(f"there is no study {name!r}. {advice_for(name, list(STUDIES))}")
    parser.error(f"the first argument must be a study, got {name or 'none'}. {advice_for('', list(STUDIES))}")


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], tuple)
