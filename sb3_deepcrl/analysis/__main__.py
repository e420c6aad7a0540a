"""
The command ``python -m sb3_deepcrl.analysis``, which is also ``sb3-deepcrl-analysis``: shells complete programs only.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_origin

from rich.console import Console
from rich.markdown import Markdown

try:
    import tyro
except ImportError as error:
    sys.exit(
        f'sb3_deepcrl.analysis: error: {error}: install the extra "analysis", in a clone by `pip install -e ".[analysis]"`'
    )

from sb3_deepcrl.analysis import STUDIES
from sb3_deepcrl.analysis.study import literal_or_text
from sb3_deepcrl.common.startup import end_start
from sb3_deepcrl.common.utils import is_for_user, stopped_by_signals, whole_number

GOES_ON = "The same command goes on from the last evaluations."
registry = tyro.constructors.ConstructorRegistry()


def key_value(text: str) -> tuple[str, Any]:
    """Read ``key:value``, where the value is a Python literal or else text."""
    key, colon, value = text.partition(":")
    if not colon or not key:
        raise ValueError(f"expected key:value, got {text!r}")
    return key, literal_or_text(value)


def _add_type(kind: type, nargs: Any, metavar: str, read: Callable[..., Any], write: Callable[..., list[str]]) -> None:
    """Let options of a type be written in another way than tyro has it."""

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if (get_origin(info.type) or info.type) is not kind:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(nargs, metavar, read, lambda value: isinstance(value, kind), write)


# Whole numbers may be 1e6, and dicts are as in RL Zoo, but text in them needs no quotes
_add_type(int, 1, "INT", lambda words: whole_number(words[0]), lambda value: [str(value)])
_add_type(dict, "*", "KEY:VALUE", lambda words: dict(map(key_value, words)), lambda d: [f"{k}:{v}" for k, v in d.items()])


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study."""
    end_start()
    program = Path(sys.argv[0])
    prog = program.name if program.stem == "sb3-deepcrl-analysis" else "python -m sb3_deepcrl.analysis"
    numbers: list[int] = []
    console = Console()
    args = list(sys.argv[1:] if argv is None else argv)
    # In the list of all of them a line each, the first one of the docstring
    lines = {name: None if name in args else str(study.__doc__).strip().partition("\n")[0] for name, study in STUDIES.items()}
    studies = (
        Annotated[Any, tyro.conf.subcommand(name=name, constructor=study, description=lines[name])]
        for name, study in STUDIES.items()
    )
    choice: Any = Union[tuple(studies)]  # noqa: UP007
    try:
        with registry:
            study = tyro.cli(
                choice,
                prog=prog,
                description="The paper's questions. Each study trains what is missing and writes Markdown, CSV and a picture.",
                args=args,
            )
        with stopped_by_signals() as numbers:
            report = study.run(console)
    except KeyboardInterrupt:
        print(f"Stopped. {GOES_ON}", file=sys.stderr)
        sys.exit(128 + (numbers[0] if numbers else signal.SIGINT))
    except Exception as error:
        if not is_for_user(error):
            error.add_note(GOES_ON)
            raise
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    if report is not None and report.path is not None:
        console.print(Markdown(report.path.read_text()))
        console.print(f"Written to {report.path}")


if __name__ == "__main__":
    main()
