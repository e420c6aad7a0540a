"""
What the learning benchmarks share: train with evaluations, one CSV file a run, several runs side by side.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_deepcrl import SuccessInfoWrapper, evaluate_goals
from sb3_deepcrl.common.evaluation import mean_of_episodes

# Evaluation envs have their own seed, the same for all algorithms and training seeds
EVAL_SEED = 10_000
N_EVAL_ENVS = 25


def make_env(env_id: str, n_envs: int, seed: int) -> VecEnv:
    """
    :param env_id: Id of the env
    :param n_envs: Number of parallel envs
    :param seed: Seed of the first one
    :return: The vectorised env, which reports ``is_success``
    """
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    return make_vec_env(env_id, n_envs, seed=seed, wrapper_class=SuccessInfoWrapper)


class EvaluationLog(BaseCallback):
    """
    Evaluate every ``eval_freq`` env steps and append the means to a CSV file. The clock, which is that of the processor,
    stands still meanwhile.

    :param env_id: Id of the env
    :param path: The CSV file
    :param eval_freq: Env steps between two evaluations
    :param n_eval_episodes: Number of evaluation episodes
    :param labels: First columns of each row
    """

    def __init__(self, env_id: str, path: Path, eval_freq: int, n_eval_episodes: int, labels: dict[str, object]):
        super().__init__()
        self.env_id, self.path, self.labels = env_id, path, labels
        self.eval_freq, self.n_eval_episodes = eval_freq, n_eval_episodes
        self.next_eval, self.seconds_off = eval_freq, 0.0

    def _on_training_start(self) -> None:
        self.start = time.process_time()

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.next_eval:
            self.next_eval += self.eval_freq
            self.evaluate()
        return True

    def evaluate(self) -> None:
        """
        Evaluate now.
        """
        seconds = time.process_time() - self.start - self.seconds_off
        env = make_env(self.env_id, N_EVAL_ENVS, EVAL_SEED)
        vec_normalize = self.model.get_vec_normalize_env()

        def predict(observation, *args, **kwargs):
            if vec_normalize is not None:
                observation = vec_normalize.normalize_obs(observation)
            return self.model.predict(observation, *args, **kwargs)

        means = mean_of_episodes(evaluate_goals(_Predictor(predict), env, self.n_eval_episodes))
        env.close()
        row = {
            **self.labels,
            "timesteps": self.num_timesteps,
            "updates": self.model._n_updates,
            "seconds": round(seconds, 1),
            **{name: round(value, 4) for name, value in means.items()},
        }
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        self.seconds_off = time.process_time() - self.start - seconds


class _Predictor:
    def __init__(self, predict: Callable):
        self.predict = predict


def train_and_log(
    model: OffPolicyAlgorithm,
    env_id: str,
    steps: int,
    path: Path,
    eval_freq: int,
    n_eval_episodes: int,
    labels: dict[str, object],
) -> None:
    """
    Train a model, with its evaluations in a CSV file that appears under its name when the run is complete.

    :param model: The model
    :param env_id: Id of the env
    :param steps: Number of env steps
    :param path: The CSV file
    :param eval_freq: Env steps between two evaluations
    :param n_eval_episodes: Number of evaluation episodes
    :param labels: First columns of each row
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    model.learn(
        steps,
        callback=EvaluationLog(env_id, partial, eval_freq, n_eval_episodes, labels),
        log_interval=None,  # type: ignore[arg-type]
    )
    partial.rename(path)


def run_all(script: str, runs: Sequence[tuple[Path, Iterable[str]]], jobs: int) -> None:
    """
    Start a process for each run that is not complete, some at a time, each on one thread.

    :param script: The Python file to run
    :param runs: For each run the CSV file that it writes and its arguments
    :param jobs: How many at a time
    """
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("", total=len(runs))

        def run(path: Path, args: Iterable[str]) -> None:
            if not path.exists():
                subprocess.run([sys.executable, "-W", "ignore", script, *args], check=True)
            progress.advance(task)

        for future in [pool.submit(run, path, args) for path, args in runs]:
            future.result()


def runs_of(rows: list[dict[str, str]], setting: str) -> list[list[dict[str, str]]]:
    """
    :param rows: Evaluations of all runs
    :param setting: Value of the column ``setting``
    :return: The evaluations of each seed with that setting
    """
    seeds = sorted({int(row["seed"]) for row in rows})
    return [[row for row in rows if row["setting"] == setting and int(row["seed"]) == seed] for seed in seeds]


def draw_curve(ax: Any, runs: list[list[dict[str, str]]], column: str, **kwargs: Any) -> None:
    """
    Draw the median over the seeds as a line and their range as a band, over thousands of env steps.

    :param ax: Axes of matplotlib
    :param runs: The evaluations of each seed
    :param column: What to draw
    :param kwargs: Style of the line
    """
    steps = np.array([float(row["timesteps"]) for row in runs[0]]) / 1000
    values = np.array([[float(row[column]) for row in run] for run in runs])
    (line,) = ax.plot(steps, np.median(values, axis=0), **kwargs)
    ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15, lw=0)
    ax.set(xlabel="env steps (thousands)", ylim=(0, 1.02))


def run_folder(folder: Path, args: argparse.Namespace) -> Path:
    """
    :param folder: Folder of all runs of a benchmark
    :param args: Arguments of the command line
    :return: Folder of the runs with these arguments, so that complete runs are only taken up again for the same question
    """
    return folder / f"{args.env}-{args.steps}-{args.eval_freq}-{args.eval_episodes}"


def machine(jobs: int) -> str:
    """
    :param jobs: Runs side by side
    :return: What the runs were made on
    """
    return (
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, torch {th.__version__}, one thread a run, {jobs} runs side "
        "by side, and other work at times: compare seconds within this table only."
    )


def use_one_thread() -> None:
    """
    Runs side by side have one thread each.
    """
    th.set_num_threads(1)
