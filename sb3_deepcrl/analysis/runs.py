"""
Training runs that can be stopped at any time, and many of them side by side.
"""

import csv
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium.error import UnregisteredEnv
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_deepcrl.common.evaluation import evaluate_goals, mean_of_episodes
from sb3_deepcrl.common.save_util import atomic_path
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.envs import BatchVecEnv, SuccessInfoWrapper
from sb3_deepcrl.envs.registration import ENV_TABLE

# Evaluation envs have their own seed, the same for all settings and training seeds
EVAL_SEED = 10_000
ALGORITHMS = ("DeepCRL", "SAC+HER", "TQC+HER")
# What an algorithm reports of its last update, where it has it
TRAINING_MEASURES = ("critic_loss", "categorical_accuracy", "ent_coef", "entropy")


@dataclass(frozen=True)
class Run:
    """
    A training run with evaluations. Runs that differ in ``seed`` only are seeds of one setting.

    :param env: Id of the env that is trained on
    :param steps: Number of env steps
    :param eval_freq: Env steps between two evaluations
    :param eval_env: Id of the env that is evaluated on
    :param n_eval_episodes: Number of episodes of an evaluation
    :param seed: Seed of envs and model
    :param n_envs: Number of envs
    :param transitions_per_update: Number of transitions that are collected for each update
    :param algorithm: One of ``ALGORITHMS``
    :param hyperparams: Other arguments of the algorithm
    :param env_kwargs: Arguments of the training env
    :param eval_kwargs: Arguments of the evaluation env
    """

    env: str
    steps: int
    eval_freq: int
    eval_env: str
    n_eval_episodes: int
    seed: int = 0
    n_envs: int = 64
    transitions_per_update: int = 40
    algorithm: str = "DeepCRL"
    hyperparams: dict[str, Any] = field(default_factory=dict)
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    eval_kwargs: dict[str, Any] = field(default_factory=dict)

    def folder(self, runs: Path) -> Path:
        """
        :param runs: Folder of all runs
        :return: Folder of this one. The number of steps has no influence: a longer run goes on where a shorter one ended.
        """
        setting = {name: value for name, value in asdict(self).items() if name not in ("steps", "seed")}
        digest = hashlib.sha256(json.dumps(setting, sort_keys=True, default=str).encode()).hexdigest()[:10]
        return runs / f"{self.env}-{self.algorithm}-{digest}" / f"seed-{self.seed}"


def make_env(env_id: str, n_envs: int, seed: int, env_kwargs: Mapping[str, Any] | None = None) -> VecEnv:
    """
    :param env_id: Id of the env
    :param n_envs: Number of parallel envs
    :param seed: Seed of the first one
    :param env_kwargs: Arguments of the env
    :return: The vectorised env, which reports ``is_success``; natively stepped if it is one of this package
    """
    if env_id in ENV_TABLE:
        env = BatchVecEnv(env_id, n_envs, n_threads=th.get_num_threads(), **(env_kwargs or {}))
        env.seed(seed)
        return env
    register_robotics()
    return make_vec_env(env_id, n_envs, seed=seed, wrapper_class=SuccessInfoWrapper, env_kwargs=dict(env_kwargs or {}))


def make_single_env(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> gym.Env:
    """
    :param env_id: Id of the env
    :param env_kwargs: Arguments of the env
    :return: The env, not vectorised
    """
    if env_id not in ENV_TABLE:
        register_robotics()
    return gym.make(env_id, **(env_kwargs or {}))


def register_robotics() -> None:
    """Make the ids of gymnasium-robotics known."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)


def check_env_id(env_id: str) -> str:
    """
    :param env_id: Id of an env
    :return: The same
    :raises ValueError: if there is no such env
    """
    if env_id not in ENV_TABLE:
        register_robotics()
        try:
            gym.spec(env_id)
        except (UnregisteredEnv, gym.error.Error) as error:
            raise ValueError(f"There is no env {env_id!r} ({error}): use an id such as PointU4Maze-v0") from None
    return env_id


def eval_env_of(env_id: str) -> str:
    """
    :param env_id: Id of a training env
    :return: Id of the env with its evaluation goals, the same where there are none
    """
    name, _, version = env_id.rpartition("-")
    twin = f"{name}Eval-{version}"
    return twin if twin in ENV_TABLE else env_id


def update_schedule(n_envs: int, transitions_per_update: int) -> dict[str, int]:
    """
    :param n_envs: Number of envs
    :param transitions_per_update: Number of transitions for each update
    :return: ``train_freq`` and ``gradient_steps``, the smallest ones with that ratio
    """
    divisor = math.gcd(n_envs, transitions_per_update)
    return {"train_freq": transitions_per_update // divisor, "gradient_steps": n_envs // divisor}


def make_model(run: Run, env: VecEnv) -> OffPolicyAlgorithm:
    """
    :param run: What is trained
    :param env: Its envs
    :return: The untrained model
    :raises ValueError: if there is no such algorithm
    """
    settings = {**update_schedule(run.n_envs, run.transitions_per_update), "seed": run.seed, "device": "auto"}
    if run.algorithm == "DeepCRL":
        return DeepCRL("MultiInputPolicy", env, **{**settings, **run.hyperparams})
    if run.algorithm not in ALGORITHMS:
        raise ValueError(f"Unknown algorithm {run.algorithm!r}. Choose one of: {', '.join(ALGORITHMS)}")
    from stable_baselines3 import HerReplayBuffer

    settings["replay_buffer_class"] = HerReplayBuffer
    return algorithm_class(run.algorithm)("MultiInputPolicy", env, **{**settings, **run.hyperparams})


def algorithm_class(algorithm: str) -> type[OffPolicyAlgorithm]:
    """
    :param algorithm: One of ``ALGORITHMS``
    :return: Its class
    """
    if algorithm == "DeepCRL":
        return DeepCRL
    if algorithm == "SAC+HER":
        from stable_baselines3 import SAC

        return SAC
    from sb3_contrib import TQC

    return TQC


def load_model(run: Run, runs: Path, env: VecEnv | None = None) -> Any:
    """
    :param run: A run that has been trained
    :param runs: Folder of all runs
    :param env: Env for the model
    :return: Its model
    """
    # Without an env there is no need for a place to store its transitions
    custom_objects = {} if env is not None else {"buffer_size": 1}
    return algorithm_class(run.algorithm).load(run.folder(runs) / "model.zip", env, custom_objects=custom_objects)


class Evaluations(BaseCallback):
    """
    Evaluate now and then, and save model, replay buffer and results each time, so that the run can go on from there.
    The clock, which is that of the processor, stands still meanwhile.

    :param run: What is trained
    :param folder: Its folder
    :param rows: Evaluations so far
    """

    def __init__(self, run: Run, folder: Path, rows: list[dict[str, Any]]):
        super().__init__()
        self.run, self.path, self.rows = run, folder, rows
        self.seconds_before = float(rows[-1]["seconds"]) if rows else 0.0
        self.seconds_off = 0.0

    def _on_training_start(self) -> None:
        self.start = time.process_time()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        # Here, and not in a step, as all transitions so far are in the replay buffer
        if (
            self.num_timesteps // self.run.eval_freq
            > (int(self.rows[-1]["timesteps"]) if self.rows else 0) // self.run.eval_freq
        ):
            self.evaluate()

    def evaluate(self) -> None:
        """
        Evaluate and save now.
        """
        now = time.process_time()
        env = make_env(self.run.eval_env, min(self.run.n_eval_episodes, 64), EVAL_SEED, self.run.eval_kwargs)
        means = mean_of_episodes(evaluate_goals(self.model, env, self.run.n_eval_episodes))
        env.close()
        training = {name: self.model.logger.name_to_value.get(f"train/{name}") for name in TRAINING_MEASURES}
        self.rows.append(
            {
                "timesteps": self.num_timesteps,
                "updates": self.model._n_updates,
                "seconds": round(self.seconds_before + now - self.start - self.seconds_off, 1),
                **{name: round(value, 4) for name, value in means.items()},
                **{name: "" if value is None else round(float(value), 4) for name, value in training.items()},
            }
        )
        write_rows(self.path / "results.csv", self.rows)
        assert isinstance(self.model, OffPolicyAlgorithm)
        with atomic_path(self.path / "buffer.pkl", ".pkl") as path:
            self.model.save_replay_buffer(path)
        with atomic_path(self.path / "model.zip", ".zip") as path:
            self.model.save(path)
        self.seconds_off += time.process_time() - now


def results_of(run: Run, runs: Path) -> list[dict[str, str]]:
    """
    :param run: A run
    :param runs: Folder of all runs
    :return: Its evaluations so far, up to its number of steps
    """
    path = run.folder(runs) / "results.csv"
    rows = read_rows([path]) if path.exists() else []
    return [row for row in rows if int(row["timesteps"]) < run.steps + run.eval_freq]


def is_complete(run: Run, runs: Path) -> bool:
    """
    :param run: A run
    :param runs: Folder of all runs
    :return: Whether all its steps have been made
    """
    rows = results_of(run, runs)
    return bool(rows) and int(rows[-1]["timesteps"]) >= run.steps


def train(run: Run, runs: Path, n_threads: int | None = None) -> None:
    """
    Train, from the last evaluation on if there was one.

    :param run: What to train
    :param runs: Folder of all runs
    :param n_threads: Number of threads, as it is by default
    """
    if n_threads is not None:
        th.set_num_threads(n_threads)
    folder = run.folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(asdict(run), indent=2, default=str) + "\n")
    env = make_env(run.env, run.n_envs, run.seed, run.env_kwargs)
    rows: list[dict[str, Any]] = []
    if (folder / "model.zip").exists():
        model = load_model(run, runs, env)
        model.load_replay_buffer(folder / "buffer.pkl")
        # The results are written before the model, so they may hold an evaluation more
        rows = [row for row in read_rows([folder / "results.csv"]) if int(row["timesteps"]) <= model.num_timesteps]
    else:
        model = make_model(run, env)
    callback = Evaluations(run, folder, rows)
    model.learn(
        run.steps - model.num_timesteps,
        callback=callback,
        log_interval=None,  # type: ignore[arg-type]
        reset_num_timesteps=False,
    )
    if not is_complete(run, runs):
        callback.evaluate()
    env.close()


def train_all(
    runs_by_label: Mapping[str, Sequence[Run]],
    runs: Path,
    jobs: int | None = None,
    train_function: Callable[[Run, Path, int | None], None] = train,
    console: Console | None = None,
    is_done: Callable[[Run, Path], bool] = is_complete,
) -> None:
    """
    Train all runs that are not complete, several side by side, each with an equal part of the processor's cores.

    :param runs_by_label: The seeds of each setting
    :param runs: Folder of all runs
    :param jobs: How many at a time, by default as many as there are cores. One runs in this process.
    :param train_function: How to train one
    :param console: Where to show the progress, the terminal by default
    :param is_done: Whether a run needs no training
    """
    all_runs = [(label, run) for label, seeds in runs_by_label.items() for run in seeds]
    open_runs = [(label, run) for label, run in all_runs if not is_done(run, runs)]
    n_cores = n_usable_cores()
    jobs = max(1, min(jobs or n_cores, len(open_runs)))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("env steps", total=sum(run.steps for _, run in all_runs))
        bars = {
            run.folder(runs): progress.add_task(f"{label}, seed {run.seed}", total=run.steps, visible=False, start=False)
            for label, run in open_runs
        }

        def refresh() -> None:
            done = 0
            for label, run in all_runs:
                rows = results_of(run, runs)
                steps = min(int(rows[-1]["timesteps"]), run.steps) if rows else 0
                done += steps
                if run.folder(runs) in bars and (run.folder(runs) / "run.json").exists():
                    bar = bars[run.folder(runs)]
                    progress.start_task(bar)
                    last = f", time at goal {float(rows[-1]['time_at_goal']):.0f}" if rows else ""
                    progress.update(bar, completed=steps, visible=True, description=f"{label}, seed {run.seed}{last}")
            progress.update(total, completed=done)

        refresh()
        if jobs == 1:
            for _, run in open_runs:
                train_function(run, runs, None)
                refresh()
            return
        # Fresh processes, not forks: threads of PyTorch do not survive a fork
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1)
        try:
            pending: set[Future[None]] = {
                pool.submit(train_function, run, runs, max(1, n_cores // jobs)) for _, run in open_runs
            }
            while pending:
                finished, pending = wait(pending, timeout=1)
                refresh()
                for future in finished:
                    future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def n_usable_cores() -> int:
    """
    :return: Number of cores that this process may use
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_rows(paths: Iterable[Path]) -> list[dict[str, str]]:
    """
    :param paths: CSV files with the same columns
    :return: All their rows
    """
    rows: list[dict[str, str]] = []
    for path in paths:
        with path.open(newline="") as file:
            rows.extend(csv.DictReader(file))
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """
    Write a CSV file as a whole or not at all.

    :param path: The CSV file
    :param rows: What to write
    """
    with atomic_path(path, ".csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
