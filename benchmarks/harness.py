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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch as th

from sb3_deepcrl.common.utils import processor


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


def machine(device: str, n_threads: int) -> str:
    """What the benchmark runs on."""
    cpu = f"{n_threads} threads of {processor()} ({th.backends.cpu.get_cpu_capability()}), torch {th.__version__}"
    if device == "cpu":
        return f"{cpu}, no GPU"
    capability = ".".join(map(str, th.cuda.get_device_capability()))
    memory = th.cuda.mem_get_info()[1] / 2**30
    return f"{th.cuda.get_device_name()} ({memory:.0f} GiB, compute capability {capability}) and {cpu}"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table in Markdown, of rows by column. Not all of them need to have all columns."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        values = [row.get(name, "") for name in head]
        lines.append(f"| {' | '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in values)} |")
    return lines


def write_report(title: str, note: str, tables: Iterable[list[Mapping[str, Any]]], output: Path | None) -> None:
    """Print a report with tables as lists of rows by column, and write it to a file if there is one."""
    lines = [f"# {title}", "", note, "", f"Printed by `python {shlex.join(sys.argv)}`."]
    for rows in tables:
        lines += ["", *table(rows)]
    text = "\n".join([*lines, ""])
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
