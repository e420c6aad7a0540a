"""
What all studies are: settings, each trained with several seeds, and a report of what came out.
"""

import ast
import math
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from rich.console import Console

from sb3_deepcrl.analysis.runs import (
    Run,
    check_code,
    check_env_id,
    check_hyperparams,
    differences,
    eval_env_of,
    is_complete,
    load_model,
    records_of,
    results_of,
    train,
    train_all,
    write_rows,
)
from sb3_deepcrl.analysis.statistics import N_LAST, Estimate, curves_of, final_scores, interquartile_mean
from sb3_deepcrl.common.utils import atomic_path, check_depth
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs.arguments import check_env_kwargs
from sb3_deepcrl.envs.registration import ENV_TABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Options of all studies that are arguments of DeepCRL
SHARED = ("width", "batch_size", "learning_rate", "gamma", "precision")
# The evaluations of each seed, by setting
Results = dict[str, list[list[dict[str, str]]]]


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """
    A field of a study, which is also an option of the command line.

    :param default: Its default
    :param help: What it is
    :param kwargs: Other arguments of ``argparse``
    :return: The field
    """
    metadata = {"help": help, **kwargs}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def command_sentence(command: str) -> str:
    """
    :param command: A command
    :return: How a report names it
    """
    return f"Command: `{command}`."


@dataclass
class Report:
    """
    What a study found.

    :param title: First line
    :param rows: Rows of the CSV file, all with the same columns
    :param table: Rows of the table, all with the same columns
    :param notes: Sentences below it
    :param figure: The picture
    :param path: The Markdown file, once it is written
    """

    title: str
    rows: list[dict[str, Any]]
    table: list[dict[str, Any]]
    notes: list[str]
    figure: "Figure"
    path: Path | None = None

    def markdown(self, command: str, figure_name: str, made_with: str) -> str:
        """
        :param command: The command that makes this report
        :param figure_name: File name of the picture
        :param made_with: What its runs were made with
        :return: The report as text
        """
        lines = [f"# {self.title}", "", f"{command_sentence(command)} {made_with}", ""]
        columns = list(self.table[0])
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in self.table]
        for note in self.notes:
            lines += ["", note]
        return "\n".join([*lines, "", f"![{self.title}]({figure_name})", ""])


@dataclass
class Study(ABC):
    """
    Base class of the studies. Each field is an option of the command line with the same name.

    A study trains every setting with several seeds, each a run of its own that is saved at every evaluation. Called again it
    goes on where it was stopped, with other studies' runs of the same settings, with more seeds, or with more steps and
    evaluations in the same proportion.

    :raises ValueError: If an env does not exist, or a number is out of its range
    """

    name: ClassVar[str]
    #: One line for the help of the command line
    summary: ClassVar[str]

    env: str = option("PointU4Maze-v0", "Env that is trained on")
    eval_env: str = option(
        None, "Env that is evaluated on, by default the one with the evaluation goals of the same maze", type=str
    )
    seeds: int = option(3, "Number of seeds")
    steps: int = option(1_000_000, "Number of env steps of each run")
    n_evaluations: int = option(20, "Number of evaluations of each run")
    n_eval_episodes: int = option(64, "Number of episodes of each evaluation")
    n_envs: int = option(64, "Number of parallel envs")
    transitions_per_update: int = option(40, "Number of transitions that are collected for each update")
    width: int = option(
        None, "Width of the networks, by default 32 for the point and 256, the paper's, for all others", type=int
    )
    batch_size: int = option(None, "Size of the minibatches, by default 1024 for the point and 256 for all others", type=int)
    learning_rate: float = option(6e-4, "Learning rate: twice the paper's, whose runs are a hundred times as long")
    gamma: float = option(
        None, "Discount factor, by default 0.95 for the point and 0.99, the paper's, for all others", type=float
    )
    precision: str = option("auto", "Precision of the matrix products", choices=("float32", "bfloat16", "auto"))
    hyperparams: dict[str, Any] = option({}, "Other arguments of DeepCRL, e.g. energy:dot")
    env_kwargs: dict[str, Any] = option({}, "Arguments of both envs, e.g. cell_size:4.0")
    gym_packages: list[str] = option(
        None, "Modules to import, which register envs; --env panda_gym:PandaReach-v3 does it too", type=str, nargs="+"
    )

    def __post_init__(self) -> None:
        packages = dict.fromkeys(self.gym_packages or [])
        for name in ("env", "eval_env"):
            if (env_id := getattr(self, name)) is not None:
                setattr(self, name, check_env_id(env_id, packages))
                # Processes that train find it by these
                packages |= dict.fromkeys(env_id.split(":")[:-1])
        self.gym_packages = list(packages) or None  # type: ignore[assignment]
        for name, default in defaults_of(self.env).items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        for env_id in (self.env, self.eval_env):
            check_env_kwargs(find_spec(env_id), self.env_kwargs)
        check_hyperparams(self.hyperparams)
        # Reports say what these are
        self.check_free({name: name for name in SHARED})
        for item in fields(self):
            value = getattr(self, item.name)
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, int) and number < 1 for number in numbers):
                raise ValueError(f"`{item.name}` must be at least 1, got {value}")
            if value == []:
                raise ValueError(f"`{item.name}` must hold at least one value, got none")
            if isinstance(value, list) and len(set(map(str, value))) < len(value):
                raise ValueError(f"`{item.name}` holds a value twice: {value}")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"`gamma` must be between 0 and 1, got {self.gamma}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}")
        if self.steps < self.n_evaluations:
            raise ValueError(f"`n_evaluations` must be at most the number of steps {self.steps}, got {self.n_evaluations}")

    def make_run(self, **hyperparams: Any) -> Run:
        """
        :param hyperparams: Arguments of DeepCRL, before those that all runs of the study have, and after ``hyperparams``
        :return: A run of this study
        """
        return Run(
            env=self.env,
            steps=self.steps,
            eval_freq=self.steps // self.n_evaluations,
            eval_env=self.eval_env,
            n_eval_episodes=self.n_eval_episodes,
            n_envs=self.n_envs,
            transitions_per_update=self.transitions_per_update,
            hyperparams={
                **{name: getattr(self, name) for name in SHARED},
                **hyperparams,
                **self.hyperparams,
            },
            env_kwargs=self.env_kwargs,
            eval_kwargs=self.env_kwargs,
        )

    def check_free(self, options: Mapping[str, str]) -> None:
        """
        Check that ``hyperparams`` leaves alone what the study sets: it has priority, so that all settings would be the same.

        :param options: Argument of DeepCRL or key of its ``policy_kwargs``, and the option that sets it
        :raises ValueError: if it does not
        """
        for name, value in {**self.hyperparams.get("policy_kwargs", {}), **self.hyperparams}.items():
            if name in options:
                raise ValueError(
                    f"`hyperparams` holds `{name}={value!r}`, which this study sets itself: use `{options[name]}`"
                )

    def protocol(self) -> str:
        """
        :return: What was measured, in words
        """
        return (
            f"Trained on {self.env} and evaluated on {self.eval_env}, {self.n_eval_episodes} episodes each time. Time at goal "
            "is the number of steps of an episode at the goal, success reaching it at any step. "
            f"{self.averaging()}, of the mean over the last {min(N_LAST, self.n_evaluations)} evaluations. Seconds are CPU "
            "seconds of training, without evaluations, with other runs beside it: compare them within this report only."
        )

    def training(self) -> str:
        """
        :return: How the runs were made, in words
        """
        return (
            f"Each run: {self.steps:,} env steps of {self.n_envs} envs, an update for {self.transitions_per_update} "
            f"transitions, width {self.width}, batch size {self.batch_size}, learning rate {self.learning_rate:g}, gamma "
            f"{self.gamma:g}, precision {self.precision}."
        )

    def averaging(self) -> str:
        """
        :return: How the seeds are summarised, in words
        """
        if self.seeds == 1:
            return "One seed"
        if self.seeds < 4:
            # That is what resampling so few of them comes to
            return f"Means over {self.seeds} seeds with 95 % bootstrap intervals, which are their range"
        return f"Interquartile means over {self.seeds} seeds with 95 % bootstrap intervals"

    def caption(self) -> str:
        """
        :return: Title of a picture
        """
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return f"{self.eval_env.removesuffix('-v0')}, width {self.width}, batch size {self.batch_size}, {seeds}"

    @abstractmethod
    def settings(self) -> dict[str, Run]:
        """
        :return: A run of each setting, by label
        """

    @abstractmethod
    def report(self, results: Results, runs: Path) -> Report:
        """
        :param results: Evaluations of each seed by setting, all of them complete
        :param runs: Folder of all runs
        :return: What came out
        """

    def train_run(self, run: Run, runs: Path, n_threads: int | None = None, reuse_other_code: bool = False) -> None:
        """
        :param run: What to train
        :param runs: Folder of all runs
        :param n_threads: Number of threads
        :param reuse_other_code: Whether what is there may have been made by other code than this
        """
        check_env_id(run.env, self.gym_packages or ())
        train(run, runs, n_threads, reuse_other_code)

    def is_complete(self, run: Run, runs: Path) -> bool:
        """
        :param run: A run
        :param runs: Folder of all runs
        :return: Whether :meth:`train_run` has nothing left to do
        """
        return is_complete(run, runs)

    def seeds_of(self, run: Run) -> list[Run]:
        """
        :param run: A run
        :return: The same with each seed
        """
        return [Run(**{**vars(run), "seed": seed}) for seed in range(self.seeds)]

    def run(
        self,
        runs: str | Path = "runs",
        output: str | Path | None = None,
        jobs: int | None = None,
        console: Console | None = None,
        reuse_other_code: bool = False,
    ) -> Report:
        """
        Train what has not been trained, and write the report: a Markdown file, a CSV file and a picture.

        :param runs: Folder of all runs
        :param output: Path of the Markdown file; the others lie beside it. By default see :meth:`report_path`.
        :param jobs: Number of runs side by side, by default the number of cores
        :param console: Where to show the progress
        :param reuse_other_code: Whether to take runs, and go on with half-done ones, that were made by other code of this
            package or with other defaults than there are now. The report says so.
        :return: The report
        :raises ValueError: If there are such runs and they may not be taken, or a file cannot be written
        """
        runs = Path(runs)
        output = check_output(output, runs)
        runs_by_label = {label: self.seeds_of(run) for label, run in self.settings().items()}
        train_all(runs_by_label, runs, jobs, self.train_run, console, self.is_complete, reuse_other_code)
        all_runs = [run for seeds in runs_by_label.values() for run in seeds]
        if not reuse_other_code:
            # It may have been edited meanwhile
            check_code(all_runs, runs)
        results = {label: [results_of(run, runs) for run in seeds] for label, seeds in runs_by_label.items()}
        report = self.report(results, runs)
        report.notes += [self.training(), *notes_on_code(all_runs, runs)]
        report.path = path = output or self.report_path(runs)
        write_rows(path.with_suffix(".csv"), report.rows)
        # The layout moves the ticks, whose labels it needs to know
        report.figure.draw_without_rendering()
        with atomic_path(path.with_suffix(".png"), ".png") as temporary:
            report.figure.savefig(temporary, format="png", dpi=150)
        text = report.markdown(self.command(), path.with_suffix(".png").name, made_with(all_runs, runs))
        with atomic_path(path, ".md") as temporary:
            temporary.write_text(text)
        return report

    def report_path(self, runs: Path) -> Path:
        """
        :param runs: Folder of all runs
        :return: Markdown file in that folder, with a number if there are reports of the same study with other options
        """
        number = 1
        while True:
            path = runs / f"{self.name}-{self.env}{f'-{number}' if number > 1 else ''}.md"
            if not path.exists() or command_sentence(self.command()) in path.read_text():
                return path
            number += 1

    def command(self) -> str:
        """
        :return: The command line of this study
        """
        words = ["python", "-m", "sb3_deepcrl.analysis", self.name]
        found = defaults_of(self.env)
        for item in fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.name == "env" or value not in (default, found.get(item.name, default)):
                words.append(f"--{item.name.replace('_', '-')}")
                if isinstance(value, dict):
                    words += [f"{key}:{literal(entry)}" for key, entry in value.items()]
                else:
                    words += map(str, value if isinstance(value, (list, tuple)) else [value])
        return shlex.join(words)


def literal(value: Any) -> str:
    """
    :param value: A value of a dict that is an option
    :return: How to write it on the command line: without quotes if it is a string that can be nothing else
    """
    if isinstance(value, str):
        try:
            ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return value
    return repr(value)


def defaults_of(env_id: str) -> dict[str, Any]:
    """
    Options whose default depends on the env. The point of this package differs from the paper's tasks in three:

    - The chance to be at a goal that is n steps away is ``gamma^n`` (without detours), so that gamma sets what the critic can
      tell apart. The point needs a tenth of the paper's steps.
    - Four layers of 256 units are enough for the maze U4 in the plane, which leaves nothing for depth to gain.
    - In U4 depth 16 gains from minibatches of 1024, depth 4 does not, as in figure 7 of the paper
      (``docs/results/depth_PointU4Maze.md`` against ``depth_PointU4Maze_batch256.md``).

    :param env_id: Id of an env
    :return: Their values for it
    """
    is_point = env_id.startswith("Point") and env_id in ENV_TABLE
    return {
        "eval_env": eval_env_of(env_id),
        "width": 32 if is_point else 256,
        "batch_size": 1024 if is_point else 256,
        "gamma": 0.95 if is_point else 0.99,
    }


@dataclass
class ComparisonOfDepths(Study):
    """
    Base class of the studies that compare several depths. Without settings of their own they take the models of ``depth``.
    """

    depths: list[int] = option([4, 32], "Depths")

    def __post_init__(self) -> None:
        super().__post_init__()
        for depth in self.depths:
            check_depth(depth)
        self.check_free(dict.fromkeys(("depth", "actor_depth", "critic_depth"), "depths"))

    def settings(self) -> dict[str, Run]:
        return {f"depth {depth}": self.make_run(depth=depth) for depth in self.depths}

    def models(self, runs: Path) -> Iterator[tuple[int, int, DeepCRL]]:
        """
        :param runs: Folder of all runs
        :return: Depth, seed and model of each run, one after the other
        """
        for depth in self.depths:
            for run in self.seeds_of(self.make_run(depth=depth)):
                yield depth, run.seed, load_model(run, runs)


def scores_by_depth(rows: Sequence[Mapping[str, Any]], column: str) -> dict[int, np.ndarray]:
    """
    :param rows: Rows with the columns ``depth`` and ``seed``
    :param column: What is measured
    :return: Its mean over the rows of each seed, shape ``(n_seeds,)``, by depth
    """
    values: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        values.setdefault(row["depth"], {}).setdefault(row["seed"], []).append(float(row[column]))
    return {depth: np.array([np.mean(seed) for seed in seeds.values()]) for depth, seeds in values.items()}


def describe(record: Mapping[str, Any]) -> str:
    """
    :param record: What a part of a run was made with, see :func:`~sb3_deepcrl.analysis.runs.records_of`
    :return: Code and machine in words
    """
    if "source" not in record:
        return "unknown code on an unknown machine, before runs recorded both"
    revision = f"revision {record['revision']}, " if record["revision"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    gpu = f", {record['gpu']}" if record["gpu"] else ""
    return (
        f"sb3_deepcrl {record['version']} ({revision}source {record['source']}), {packages}, on {record['processor']}{gpu}, "
        f"{record['cores']} cores, {record['threads']} thread{'s' if record['threads'] > 1 else ''} a run, precision "
        f"{record['precision']}"
    )


def made_with(all_runs: Sequence[Run], runs: Path) -> str:
    """
    :param all_runs: The runs of a report
    :param runs: Folder of all runs
    :return: Which code and machine they were made with, in words
    """
    counts = Counter("; then ".join(dict.fromkeys(map(describe, records_of(run, runs)))) for run in all_runs)
    if len(counts) == 1:
        return f"Made with {next(iter(counts))}."
    return " ".join(f"{count} of {len(all_runs)} runs were made with {what}." for what, count in counts.items())


def notes_on_code(all_runs: Sequence[Run], runs: Path) -> list[str]:
    """
    :param all_runs: The runs of a report
    :param runs: Folder of all runs
    :return: What their algorithms and envs were called with, and which of them the code of today would make otherwise
    """
    values: dict[str, dict[str, list[str]]] = {}
    others: dict[str, list[str]] = {}
    for run in all_runs:
        for record in records_of(run, runs):
            for name, value in record.get("arguments", {}).items():
                prefix, _, last = name.partition(".")
                group, key = (prefix, last) if prefix in ("env", "eval_env") else (run.algorithm, name)
                found = values.setdefault(group, {}).setdefault(key, [])
                if repr(value) not in found:
                    found.append(repr(value))
        if what := differences(run, runs):
            others.setdefault(what, []).append(str(run.folder(runs).relative_to(runs)))
    notes = []
    for group, named in values.items():
        words = [f"{key}={' or '.join(found)}" for key, found in named.items()]
        notes.append(f"Arguments of {group}, defaults included: `{', '.join(words)}`.")
    return notes + [f"Not with the code that wrote this report: {', '.join(of)}, with {what}." for what, of in others.items()]


def check_output(output: str | Path | None, runs: Path) -> Path | None:
    """
    Find out before hours of training whether there is a place for what comes out of it.

    :param output: Path of a Markdown file, None for one in the folder of the runs
    :param runs: Folder of all runs
    :return: The path
    :raises ValueError: if there is none
    """
    path = None if output is None else Path(output)
    if path is not None and (path.suffix != ".md" or path.is_dir()):
        better = path / "report.md" if path.is_dir() else path.with_suffix(".md")
        raise ValueError(f"`output` must be a Markdown file, whose name ends in .md, got '{path}': use '{better}'")
    for name, folder in {"runs": runs, "output": runs if path is None else path.parent}.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"`{name}`: '{folder}' cannot be written to ({error.strerror}): choose another place") from None
    return path


def rows_of(results: Results, columns: Mapping[str, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """
    :param results: Evaluations of each seed by setting
    :param columns: More columns of each setting, the same for all
    :return: All of them, with columns for setting and seed
    """
    return [
        {"setting": label, **(columns[label] if columns else {}), "seed": seed, **row}
        for label, seeds in results.items()
        for seed, rows in enumerate(seeds)
        for row in rows
    ]


def final_estimate(seeds: Sequence[Sequence[Mapping[str, str]]], column: str = "time_at_goal") -> Estimate:
    """
    :param seeds: Evaluations of each seed
    :param column: What is measured
    :return: Interquartile mean over the seeds of the mean over the last evaluations
    """
    return interquartile_mean(final_scores(seeds, column)[:, None])[0]


def summarize(seeds: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, Any]:
    """
    :param seeds: Evaluations of each seed
    :return: What a table says of a setting
    """
    return {
        "time at goal": final_estimate(seeds),
        "each seed": ", ".join(f"{score:.0f}" for score in final_scores(seeds, "time_at_goal")),
        "success": final_estimate(seeds, "success_any"),
        "best success": interquartile_mean(curves_of(seeds, "success_any").max(axis=1)[:, None])[0],
        "updates": seeds[0][-1]["updates"],
        "seconds": f"{np.median([float(rows[-1]['seconds']) for rows in seeds]):.0f}",
    }


def new_figure(n_rows: int = 1, n_columns: int = 1, width: float = 5.0, height: float = 3.4) -> tuple["Figure", Any]:
    """
    :param n_rows: Number of rows of axes
    :param n_columns: Number of columns of axes
    :param width: Width of each in inches
    :param height: Height of each in inches
    :return: The figure and its axes, shape ``(n_rows, n_columns)``
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(n_columns * width, n_rows * height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def draw_curve(ax: "Axes", x: Sequence[float] | Any, curves: Any, label: str, color: Any = None, linestyle: str = "-") -> None:
    """
    Draw the interquartile mean over the seeds as a line and its interval as a band.

    :param ax: Where
    :param x: Horizontal positions, shape ``(n_points,)``
    :param curves: Scores of shape ``(n_seeds, n_points)``
    :param label: Name of the line
    :param color: Its color
    :param linestyle: Its style
    """
    draw_band(ax, x, interquartile_mean(curves), label, color, linestyle)


def draw_band(
    ax: "Axes", x: Sequence[float] | Any, estimates: Sequence[Estimate], label: str, color: Any = None, linestyle: str = "-"
) -> None:
    """
    Draw estimates as a line and their intervals as a band.

    :param ax: Where
    :param x: Horizontal positions, shape ``(n_points,)``
    :param estimates: An estimate for each
    :param label: Name of the line
    :param color: Its color
    :param linestyle: Its style
    """
    means, lows, highs = np.array(estimates).T
    (line,) = ax.plot(x, means, label=label, color=color, linestyle=linestyle)
    ax.fill_between(x, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_estimates(
    ax: "Axes", x: Sequence[float] | Any, estimates: Sequence[Estimate], label: str, color: Any = None, fmt: str = "o-"
) -> None:
    """
    Draw estimates as points with their intervals.

    :param ax: Where
    :param x: Horizontal positions
    :param estimates: An estimate for each
    :param label: Name of the points
    :param color: Their color
    :param fmt: Their marker and the line between them
    """
    means, lows, highs = np.array(estimates).T
    # Of a skewed bootstrap distribution the mean may lie outside of the interval
    errors = np.maximum([means - lows, highs - means], 0)
    ax.errorbar(x, means, errors, fmt=fmt, label=label, color=color, capsize=3)


def draw_learning_curves(results: Results, styles: Mapping[str, tuple[Any, str]]) -> "Figure":
    """
    Draw time at goal and success over env steps and over seconds.

    :param results: Evaluations of each seed by setting
    :param styles: Color and line style of each setting that is drawn
    :return: The figure
    """
    figure, axes = new_figure(2, 2)
    for label, (color, linestyle) in styles.items():
        seeds = results[label]
        over = {
            "env steps (thousands)": curves_of(seeds, "timesteps").mean(axis=0) / 1000,
            "CPU seconds": curves_of(seeds, "seconds").mean(axis=0),
        }
        for row, (column, name) in enumerate((("time_at_goal", "time at goal (steps)"), ("success_any", "success"))):
            estimates = interquartile_mean(curves_of(seeds, column))
            for ax, (x_name, x) in zip(axes[row], over.items(), strict=True):
                draw_band(ax, x, estimates, label, color, linestyle)
                ax.set(xlabel=x_name, ylabel=name)
    for ax in axes[1]:
        ax.set_ylim(-0.02, 1.02)
    for ax in axes[0]:
        ax.set_ylim(bottom=0)
    add_legend(figure, axes[0, 0])
    return figure


def add_legend(figure: "Figure", ax: "Axes") -> None:
    """
    Name the lines below the figure, where the legend hides none of them.

    :param figure: The figure
    :param ax: Axes whose lines have the names
    """
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def depth_colors(depths: Sequence[int]) -> Mapping[int, Any]:
    """
    :param depths: Depths
    :return: A color for each, the darker the deeper
    """
    from matplotlib import colormaps

    return {depth: colormaps["viridis_r"](0.15 + 0.8 * i / max(len(depths) - 1, 1)) for i, depth in enumerate(sorted(depths))}
