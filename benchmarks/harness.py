"""
What the benchmarks share: options, measurements in processes of their own, and reports in Markdown.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def make_parser(description: str | None, rounds: int, seconds: float | None = None) -> argparse.ArgumentParser:
    """Make a parser with the options that all benchmarks have, and those of measurements that take some seconds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="number of measurements, of which the median is reported")
    parser.add_argument("--output", type=Path, help="file for the report (it is always printed)")
    if seconds is not None:
        parser.add_argument("--n-threads", type=int, default=os.cpu_count())
        parser.add_argument("--seconds", type=float, default=seconds, help="about the time of one measurement")
        # For `measure_apart`
        parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser


def measure_apart(*what: str, **environment: str) -> dict[str, float]:
    """Call this script in a process of its own for one measurement, which it prints as JSON."""
    command = [sys.executable, "-W", "ignore", *sys.argv, "--worker", *what]
    process = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(process.stdout.splitlines()[-1])
    print(*what, found, file=sys.stderr, flush=True)
    return found


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median of each measure over the rounds."""
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def write_report(title: str, note: str, tables: Iterable[list[Mapping[str, Any]]], output: Path | None) -> None:
    """Print a report with tables as lists of rows by column, and write it to a file if there is one."""
    lines = [f"# {title}", "", note, "", f"Printed by `python {shlex.join(sys.argv)}`."]
    for rows in tables:
        head = list(rows[0])
        lines += ["", f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
        lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    text = "\n".join([*lines, ""])
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
