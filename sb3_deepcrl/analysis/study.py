"""
What all studies are: settings, each trained with several seeds, and a report of what came out.
"""

import ast
import contextlib
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar

import gymnasium as gym
from matplotlib.figure import Figure
from rich.console import Console
from stable_baselines3.common.env_util import make_vec_env

from sb3_deepcrl.analysis.report import (
    Report,
    Results,
    describe_origin,
    draw_learning_curves,
    evaluation_rows,
    summarize,
)
from sb3_deepcrl.analysis.runs import Run, check_origin, config_entry, train_all
from sb3_deepcrl.analysis.statistics import N_LAST, Estimate, final_estimate
from sb3_deepcrl.common.utils import check_depth, check_positive_int
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs.registration import ENV_TABLE

# Options that say how a study is run, not what it asks: the command in a report is without them
HOW = ("runs", "output", "jobs", "backend", "scheduler", "dry_run", "reuse_other_code")


@dataclass(kw_only=True)
class Study(ABC):
    """
    Base class of the studies. Each field is an option of the command line with the same name.

    A study trains every setting with several seeds, each a run of its own that is saved at every evaluation. Called again it
    goes on where it was stopped, with other studies' runs of the same settings, with more seeds, or with more steps and
    evaluations in the same proportion.

    :raises ValueError: If an env does not exist, or a number is out of its range
    """

    name: ClassVar[str]
    #: Whether models are loaded for the report
    looks_into_models: ClassVar[bool] = False

    env: str = "PointU4Maze-v0"
    """Env that is trained on; one of another package with its module, as in panda_gym:PandaReach-v3"""
    eval_env: str = ""
    """Env that is evaluated on, by default the one with the evaluation goals of the same maze"""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of both envs, e.g. cell_size:4.0"""
    eval_env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the env that is evaluated on, in place of those or beside them, e.g. random_start:False"""
    hyperparams: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters, where they are not to be those of the env in zoo_configs, e.g. width:32 n_envs:16 ent_coef:auto"""
    seeds: int = 3
    """Number of seeds"""
    steps: int = 1_000_000
    """Number of env steps of each run"""
    n_evaluations: int = 20
    """Number of evaluations of each run"""
    n_eval_episodes: int = 64
    """Number of episodes of each evaluation"""
    runs: Path = Path("runs")
    """Folder of all runs"""
    output: Path | None = None
    """Markdown file to write, by default in the folder of the runs, named after study and env"""
    jobs: int | None = None
    """Number of runs side by side, by default as many as there are cores, or workers of the backend"""
    backend: str = "threading"
    """Where they run: a backend of joblib, such as dask or ray. threading is this machine"""
    scheduler: str | None = None
    """Address of the scheduler of dask, by default workers on this machine"""
    dry_run: bool = False
    """Print the commands of all runs that are not complete, for any scheduler, and do nothing"""
    reuse_other_code: bool = False
    """Take runs, and go on with half-done ones, that were made by other code of this package"""

    def __post_init__(self) -> None:
        self.runs = Path(self.runs)
        self.output = None if self.output is None else Path(self.output)
        for name in ("env", "eval_env"):
            env_id = getattr(self, name) or find_eval_env(self.env)
            try:
                # With its version
                setattr(self, name, ":".join([*env_id.split(":")[:-1], find_spec(env_id).id]))
            except gym.error.Error as error:
                raise ValueError(f"There is no env {env_id!r} ({error}): use an id such as PointU4Maze-v0") from None
        for item in fields(self):
            value = getattr(self, item.name)
            values = list(value) if isinstance(value, list | tuple) else [value]
            # Not coordinates
            if any(isinstance(number, float) for number in values):
                continue
            if any(isinstance(number, int) and not isinstance(number, bool) and number < 1 for number in values):
                raise ValueError(f"`{item.name}` must be at least 1, got {value}")
            if len(set(map(str, values))) < len(values):
                raise ValueError(f"`{item.name}` holds a value twice: {value}")

    @property
    def eval_freq(self) -> int:
        """Number of env steps from one evaluation to the next."""
        return self.steps // self.n_evaluations

    @property
    def all_eval_env_kwargs(self) -> dict[str, Any]:
        """Arguments of the env that is evaluated on, those of both envs too."""
        return {**self.env_kwargs, **self.eval_env_kwargs}

    @abstractmethod
    def settings(self) -> dict[str, Run]:
        """What is trained: a run of each setting, by label."""

    def needed_first(self) -> list[str]:
        """Labels of the settings that others learn from: they are trained before these."""
        return []

    def columns(self) -> dict[str, dict[str, Any]]:
        """What else the table and the CSV file say of each setting, by its label: values by column."""
        return {}

    def compare(self, estimates: dict[str, Estimate]) -> list[str]:
        """Answer the question of the study in sentences, from the time at goal by label."""
        return []

    def draw(self, results: Results) -> Figure:
        """Draw the picture, learning curves by default, from the evaluations of each seed by label."""
        return draw_learning_curves(results)

    def report(self, results: Results) -> Report:
        """Say what came out, from the complete evaluations of each seed by label."""
        columns = self.columns()
        table = [{"": label, **columns.get(label, {}), **summarize(seeds)} for label, seeds in results.items()]
        notes = [self.protocol(), *self.compare({label: final_estimate(seeds) for label, seeds in results.items()})]
        figure = self.draw(results)
        figure.suptitle(self.caption())
        title = f"{self.name.replace('_', ' ').capitalize()} on {self.env}"
        return Report(title, evaluation_rows(results, columns), table, notes, figure)

    def make_run(self, **hyperparams: Any) -> Run:
        """
        Make a setting of this study.

        :param hyperparams: What the setting is about; all else is as the user asks for, or in ``zoo_configs``
        :return: A run of it
        :raises ValueError: if the user sets the same, which would make all settings equal
        """
        return Run(
            env=self.env,
            eval_env=self.eval_env,
            steps=self.steps,
            eval_freq=self.eval_freq,
            n_eval_episodes=self.n_eval_episodes,
            hyperparams=_merge(self.hyperparams, hyperparams),
            env_kwargs=self.env_kwargs,
            eval_env_kwargs=self.eval_env_kwargs,
        )

    def make_run_of_depths(self, actor: int, critic: int) -> Run:
        """
        Make a setting where actor and critic may have different depths, the same as that of ``depth`` alone if they have
        not.
        """
        depth = min(actor, critic)
        deeper = {name: value for name, value in {"actor_depth": actor, "critic_depth": critic}.items() if value > depth}
        return self.make_run(depth=depth, **({"policy_kwargs": deeper} if deeper else {}))

    def seeds_of(self, run: Run) -> list[Run]:
        """Repeat a setting with each seed."""
        return [replace(run, seed=seed) for seed in range(self.seeds)]

    def run(self, console: Console | None = None) -> Report | None:
        """
        Train what has not been trained, and write the report: a Markdown file, a CSV file and a picture.

        :param console: Where to show the progress
        :return: The report, None for a dry run
        :raises ValueError: If there are runs that may not be taken, or no place to write to
        """
        path = self.report_path()
        runs_by_label = {label: self.seeds_of(run) for label, run in self.settings().items()}
        all_runs = [run for seeds in runs_by_label.values() for run in seeds]
        self._check([seeds[0] for seeds in runs_by_label.values()])
        if self.dry_run:
            open_runs = [run for run in all_runs if not run.is_complete(self.runs)]
            for command in dict.fromkeys(shlex.join(run.command(self.runs)) for run in open_runs):
                print(command)
            return None
        if not self.reuse_other_code:
            check_origin(all_runs, self.runs)
        first = {label: runs_by_label[label] for label in self.needed_first()}
        for part in (first, runs_by_label) if first else (runs_by_label,):
            train_all(part, self.runs, self.jobs, self.backend, self.scheduler, console)
        report = self.report({label: [run.evaluations(self.runs) for run in seeds] for label, seeds in runs_by_label.items()})
        report.notes += describe_origin([(run.algo, run.made_with(self.runs)) for run in all_runs])
        report.write(path, self.command())
        return report

    def _check(self, settings: list[Run]) -> None:
        """Refuse settings that would fail after hours of training."""
        from sb3_deepcrl.zoo.callbacks import reports_goals

        if not settings:
            raise ValueError("There is nothing to train: give at least one value of each option")
        has_wrapper = False
        for run in settings:
            config = {"n_envs": 1, **config_entry(run.algo, run.env.rpartition(":")[2]), **run.hyperparams}
            has_wrapper |= "env_wrapper" in config
            if wrong := [name for name in ("normalize", "frame_stack") if self.looks_into_models and config.get(name)]:
                raise ValueError(f"Models with `{wrong[0]}` cannot be looked into without their env: leave it out")
            n_envs = check_positive_int(config["n_envs"], "n_envs")
            if run.eval_freq < n_envs:
                raise ValueError(
                    f"`n_evaluations` must be at most {run.steps // n_envs}, got {self.n_evaluations}: {n_envs} envs make "
                    f"`steps={run.steps}` in so many calls. Use fewer, more `steps`, or fewer envs (`n_envs`)"
                )
        if has_wrapper:
            return
        with contextlib.closing(make_vec_env(self.eval_env, env_kwargs=self.all_eval_env_kwargs)) as env:
            if not reports_goals(env):
                raise ValueError(
                    f"{self.eval_env} has no goals (`achieved_goal` and `desired_goal`), or reports neither `is_success` nor "
                    "`success` in the infos of each step: see the guide on own envs"
                )

    def report_path(self) -> Path:
        """Find a place for the report before hours of training, with a number in its name if another one has other options."""
        path = self.output
        if path is None:
            name, number = f"{self.name}-{find_spec(self.env).id}", 1
            path = self.runs / f"{name}.md"
            while path.exists() and f"`{self.command()}`" not in path.read_text():
                number += 1
                path = self.runs / f"{name}-{number}.md"
        elif path.suffix != ".md" or path.is_dir():
            raise ValueError(f"`output` must be a Markdown file, whose name ends in .md, got '{path}'")
        for folder in (self.runs, path.parent):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                TemporaryFile(dir=folder).close()
            except OSError as error:
                raise ValueError(f"'{folder}' cannot be written to ({error.strerror}): choose another place") from None
        return path

    def command(self) -> str:
        """The command line that makes the report."""
        words = ["python", "-m", "sb3_deepcrl.analysis", self.name, "--env", self.env]
        for item in fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.name in (*HOW, "env") or value == default or (item.name, value) == ("eval_env", find_eval_env(self.env)):
                continue
            words.append(f"--{item.name.replace('_', '-')}")
            if isinstance(value, dict):
                # Without quotes if it is text that can be nothing else
                texts = {key: entry if literal_or_text(str(entry)) == entry else repr(entry) for key, entry in value.items()}
                words += [f"{key}:{text}" for key, text in texts.items()]
            elif not isinstance(value, bool):
                words += map(str, value if isinstance(value, list | tuple) else [value])
        return shlex.join(words)

    def protocol(self) -> str:
        """Say what was measured."""
        return (
            f"Trained on {self.env} and evaluated on {self.eval_env}, {self.n_eval_episodes} episodes each time. Time at goal "
            "is the number of steps of an episode at the goal, success reaching it at any step. "
            f"{self.averaging()}, of the mean over the last {min(N_LAST, self.n_evaluations)} evaluations. Steps to 90 % are "
            "the median of the env steps to the first of two evaluations in a row with that success. Seconds are CPU seconds "
            "of training, without evaluations, with other runs beside it: compare them within this report only."
        )

    def averaging(self) -> str:
        """Say how the seeds are summarized."""
        if self.seeds == 1:
            return "One seed"
        if self.seeds < 4:
            # That is what resampling so few of them comes to
            return f"Means over {self.seeds} seeds with 95 % bootstrap intervals, which are their range"
        return f"Interquartile means over {self.seeds} seeds with 95 % bootstrap intervals"

    def caption(self) -> str:
        """Title of the picture."""
        changes = "".join(f", {name} {value}" for name, value in self.hyperparams.items())
        return f"{self.eval_env.removesuffix('-v0')}{changes}, {self.seeds} seed{'s' if self.seeds > 1 else ''}"


@dataclass(kw_only=True)
class ComparisonOfDepths(Study):
    """
    Base class of the studies that compare several depths. Without settings of their own they take the models of ``depth``.
    """

    depths: tuple[int, ...] = (4, 32)
    """Depths"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for depth in self.depths:
            check_depth(depth)

    def settings(self) -> dict[str, Run]:
        return {f"depth {depth}": self.make_run(depth=depth) for depth in self.depths}

    def measure_models(self, measure: Callable[[int, int, DeepCRL], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Make the rows of what is measured of each model, of which depth, seed and model are given, one after the other."""
        rows: list[dict[str, Any]] = []
        for depth in self.depths:
            for run in self.seeds_of(self.make_run(depth=depth)):
                model = load_model(run, self.runs)
                common = {"depth": depth, "seed": run.seed, "timesteps": model.num_timesteps}
                rows += [{**common, **row} for row in measure(depth, run.seed, model)]
        return rows


def load_model(run: Run, runs: Path) -> DeepCRL:
    """Load the model of a run that is complete, without an env."""
    folder = run.read(runs)
    # The last step may be that of the last env; later models are those of a longer run
    model = folder.load_model(before=run.steps + folder.config().get("n_envs", 1))
    assert isinstance(model, DeepCRL)
    return model


def find_eval_env(env_id: str) -> str:
    """Id of the env with the evaluation goals of a task, the same where there is none."""
    name, _, version = env_id.rpartition("-")
    twin = f"{name}Eval-{version}"
    return twin if twin.rpartition(":")[2] in ENV_TABLE else env_id


def _merge(given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters of the user and of a setting, dicts in them too."""
    merged = dict(given)
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(given.get(name, {}), dict):
            merged[name] = _merge(given.get(name, {}), value)
        elif name in given:
            raise ValueError(f"`hyperparams` holds `{name}={given[name]!r}`, which this study sets itself: leave it out")
        else:
            merged[name] = value
    return merged


def literal_or_text(text: str) -> Any:
    """Read a Python literal; what is none is text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
