"""
Training runs that can be stopped at any time, and many of them side by side.
"""

import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import pickle
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process, util
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_deepcrl.analysis.provenance import code, dependencies, machine, n_usable_cores, plain
from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from sb3_deepcrl.common.evaluation import evaluate_goals, mean_of_episodes
from sb3_deepcrl.common.utils import STOP_SIGNALS, atomic_path, is_for_user, update_schedule
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.deepcrl.deepcrl import HER_KWARGS
from sb3_deepcrl.deepcrl.policies import SAC_POLICY_KWARGS
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs import BatchVecEnv, SuccessInfoWrapper
from sb3_deepcrl.envs.arguments import advice_for, arguments_of, arguments_of_env, checked_env_kwargs
from sb3_deepcrl.envs.registration import ENV_TABLE

# Evaluation envs have their own seed, the same for all settings and training seeds
EVAL_SEED = 10_000
ALGORITHMS = ("DeepCRL", "SAC+HER", "TQC+HER")
# What an algorithm reports of its last update, where it has it
TRAINING_MEASURES = ("critic_loss", "categorical_accuracy", "ent_coef", "entropy")
# In the results of a run with learners, the model that acts
COLLECTOR = "collector"
# Arguments of an algorithm that a run sets itself
OWN_ARGUMENTS = ("policy", "env", "seed", "device", "train_freq", "gradient_steps", "_init_setup_model")
# What DeepCRL accepts, with a warning, from scripts for SAC with HER
ACCEPTED = {"policy_kwargs": SAC_POLICY_KWARGS, "replay_buffer_kwargs": HER_KWARGS}
# Time for a process to end by itself before it is killed
SECONDS_TO_END = 5


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
    :param learners: By name, arguments of DeepCRL models that learn from the same replay buffer without acting, where they
        differ from ``hyperparams``
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
    learners: dict[str, dict[str, Any]] = field(default_factory=dict)

    def folder(self, runs: Path) -> Path:
        """
        :param runs: Folder of all runs
        :return: Folder of this one. The number of steps has no influence: a longer run goes on where a shorter one ended.
        """
        setting = {name: value for name, value in asdict(self).items() if name not in ("steps", "seed")}
        if not self.learners:
            del setting["learners"]
        digest = hashlib.sha256(json.dumps(setting, sort_keys=True, default=str).encode()).hexdigest()[:10]
        return runs / f"{self.env}-{self.algorithm}-{digest}" / f"seed-{self.seed}"


def make_env(env_id: str, n_envs: int, seed: int, env_kwargs: Mapping[str, Any] | None = None) -> VecEnv:
    """
    :param env_id: Id of the env
    :param n_envs: Number of parallel envs
    :param seed: Seed of the first one
    :param env_kwargs: Arguments of the env
    :return: The vectorised env, which reports ``is_success``; natively stepped if it is one of this package
    :raises ValueError: if it does not know an argument
    """
    kwargs = dict(env_kwargs or {})
    spec = find_spec(env_id)
    with checked_env_kwargs(spec, kwargs):
        if spec.id in ENV_TABLE:
            env = BatchVecEnv(spec.id, n_envs, n_threads=th.get_num_threads(), **kwargs)
            env.seed(seed)
            return env
        return make_vec_env(spec.id, n_envs, seed=seed, wrapper_class=SuccessInfoWrapper, env_kwargs=kwargs)


def make_single_env(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> gym.Env:
    """
    :param env_id: Id of the env
    :param env_kwargs: Arguments of the env
    :return: The env, not vectorised
    :raises ValueError: if it does not know an argument
    """
    kwargs = dict(env_kwargs or {})
    spec = find_spec(env_id)
    with checked_env_kwargs(spec, kwargs):
        return gym.make(spec.id, **kwargs)


def check_env_id(env_id: str, gym_packages: Iterable[str] = ()) -> str:
    """
    :param env_id: Id of an env, see :func:`~sb3_deepcrl.env_ids.find_spec`
    :param gym_packages: Modules that register envs
    :return: The id without the module that it may name
    :raises ValueError: if there is no such env
    """
    try:
        return find_spec(env_id, gym_packages).id
    except gym.error.Error as error:
        raise ValueError(f"There is no env {env_id!r} ({error}): use an id such as PointU4Maze-v0") from None


def check_hyperparams(hyperparams: Mapping[str, Any], algorithm: str = "DeepCRL", option: str = "hyperparams") -> None:
    """
    :param hyperparams: Arguments of an algorithm
    :param algorithm: One of ``ALGORITHMS``
    :param option: What holds them
    :raises ValueError: if it has no such argument, or a run sets it itself; the same of its policy and replay buffer
    """
    checks = [("", [n for n in arguments_of(algorithm_class(algorithm)).names if n not in OWN_ARGUMENTS], hyperparams)]
    for key, defaults in nested_arguments(algorithm).items():
        checks.append((f"`{key}` in ", [*defaults, *ACCEPTED[key]], hyperparams.get(key) or {}))
    for where, known, given in checks:
        if not isinstance(given, Mapping):
            raise ValueError(f"{where}`{option}` must be a dict, got {given!r}")
        for name in given:
            if name not in known:
                raise ValueError(
                    f"{where}`{option}` must be arguments of {algorithm.removesuffix('+HER')}, but {name!r} is none that can "
                    f"be set. {advice_for(name, known)}"
                )


def nested_arguments(algorithm: str) -> dict[str, dict[str, Any]]:
    """
    :param algorithm: One of ``ALGORITHMS``
    :return: Arguments of its policy and of its replay buffer that have a default, with that
    """
    policy_class = algorithm_class(algorithm).policy_aliases["MultiInputPolicy"]
    buffer_class = ContrastiveReplayBuffer if algorithm == "DeepCRL" else HerReplayBuffer
    of_buffer = arguments_of(buffer_class).defaults
    return {
        "policy_kwargs": arguments_of(policy_class).defaults,
        "replay_buffer_kwargs": {name: of_buffer[name] for name in of_buffer if name not in ("device", "n_envs")},
    }


def eval_env_of(env_id: str) -> str:
    """
    :param env_id: Id of a training env
    :return: Id of the env with its evaluation goals, the same where there are none
    """
    name, _, version = env_id.rpartition("-")
    twin = f"{name}Eval-{version}"
    return twin if twin in ENV_TABLE else env_id


def model_kwargs(run: Run) -> dict[str, Any]:
    """
    :param run: What is trained
    :return: Arguments of its algorithm, but for policy and env
    :raises ValueError: if there is no such algorithm
    """
    if run.algorithm not in ALGORITHMS:
        raise ValueError(f"Unknown algorithm {run.algorithm!r}. Choose one of: {', '.join(ALGORITHMS)}")
    settings = {**update_schedule(run.n_envs, run.transitions_per_update), "seed": run.seed, "device": "auto"}
    if run.algorithm != "DeepCRL":
        settings["replay_buffer_class"] = HerReplayBuffer
    # Stable-Baselines3 writes into the dicts that it gets, which belong to the name of the run's folder
    return {**settings, **with_modules(deepcopy(run.hyperparams))}


def make_model(run: Run, env: VecEnv) -> OffPolicyAlgorithm:
    """
    :param run: What is trained
    :param env: Its envs
    :return: The untrained model
    :raises ValueError: if there is no such algorithm
    """
    kwargs = model_kwargs(run)
    return algorithm_class(run.algorithm)("MultiInputPolicy", env, **kwargs)


def with_modules(hyperparams: Mapping[str, Any]) -> dict[str, Any]:
    """
    A run names its activation function, as all that it holds must be text for its file and the name of its folder.

    :param hyperparams: Arguments of an algorithm, in whose ``policy_kwargs`` ``activation_fn`` may be a name, such as "ReLU"
    :return: The same with the class of that name
    :raises ValueError: if there is no such activation function
    """
    policy_kwargs = hyperparams.get("policy_kwargs", {})
    name = policy_kwargs.get("activation_fn")
    if not isinstance(name, str):
        return dict(hyperparams)
    if name not in nn.modules.activation.__all__:
        raise ValueError(f"`activation_fn` must be the name of an activation function of torch.nn, such as ReLU, got {name!r}")
    return {**hyperparams, "policy_kwargs": {**policy_kwargs, "activation_fn": getattr(nn, name)}}


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
    :raises ValueError: if there is no env to train it further, and it has been trained for more steps than those of the run
    """
    # Without an env there is no need for a place to store its transitions
    custom_objects = {} if env is not None else {"buffer_size": 1}
    model = algorithm_class(run.algorithm).load(run.folder(runs) / "model.zip", env, custom_objects=custom_objects)
    if env is None and model.num_timesteps > int(results_of(run, runs)[-1]["timesteps"]):
        raise ValueError(
            f"The model in {run.folder(runs)} has been trained for {model.num_timesteps:,} env steps, more than `steps`, "
            f"which is {run.steps:,}: ask for as many steps, with `n_evaluations` in the same proportion, or give the runs "
            "another folder"
        )
    return model


def derived_seed(*numbers: int) -> int:
    """
    :param numbers: Whole numbers from 0 on
    :return: A seed that has nothing to do with that of any other numbers, but for zeros at their end, which change nothing
    """
    # Envs are seeded with this and the next numbers
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


@contextlib.contextmanager
def random_numbers(state: list[Any]) -> Iterator[None]:
    """
    Draw random numbers that change nothing for others, who find the generators of Python, NumPy and PyTorch as they were.

    :param state: Where these random numbers go on; empty for whatever there is. The place where they end is put into it.
    """

    def read() -> list[Any]:
        cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() else []
        return [random.getstate(), np.random.get_state(), th.get_rng_state(), cuda]

    def write(python: Any, numpy: Any, torch: th.Tensor, cuda: list[th.Tensor]) -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        th.set_rng_state(torch)
        th.cuda.set_rng_state_all(cuda)

    others = read()
    if state:
        write(*state)
    try:
        yield
    finally:
        state[:] = read()
        write(*others)


class Learners(BaseCallback):
    """
    Models that learn from the replay buffer of the model in training, the collector: as many updates, each right after those
    of the collector, on minibatches of their own. They don't act, and the collector learns what it learns without them.

    :param run: What is trained
    :param models: A model for each of its learners
    """

    def __init__(self, run: Run, models: Mapping[str, DeepCRL]):
        super().__init__()
        self.run, self.models = run, models
        self.random_states: dict[str, list[Any]] = {name: [] for name in models}

    def _init_callback(self) -> None:
        for index, (name, learner) in enumerate(self.models.items()):
            assert isinstance(self.model, DeepCRL)
            learner.replay_buffer = self.model.replay_buffer
            learner.set_logger(Logger(None, []))
            learner._setup_acceleration(self.run.steps // self.run.transitions_per_update)
            with random_numbers(self.random_states[name]):
                # From 1 on: a zero at the end would make the seed that of the collector, which goes on from here too
                seed = derived_seed(self.run.seed, self.model.num_timesteps, index + 1)
                set_random_seed(seed, using_cuda=learner.device.type == "cuda")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._catch_up()

    def _on_training_end(self) -> None:
        self._catch_up()

    def _catch_up(self) -> None:
        for name, learner in self.models.items():
            learner.num_timesteps = self.num_timesteps
            learner._current_progress_remaining = self.model._current_progress_remaining
            with random_numbers(self.random_states[name]):
                learner.train(self.model._n_updates - learner._n_updates, learner.batch_size)


def make_learners(run: Run, env: VecEnv) -> dict[str, DeepCRL]:
    """
    :param run: What is trained
    :param env: Its envs
    :return: Its learners, untrained
    :raises ValueError: if it has learners, but its algorithm is not DeepCRL
    """
    if run.learners and run.algorithm != "DeepCRL":
        raise ValueError(f"Learners share the replay buffer of DeepCRL, but the algorithm is {run.algorithm}: leave them out")
    models: dict[str, DeepCRL] = {}
    for index, (name, hyperparams) in enumerate(run.learners.items()):
        # Not the seed of the collector, or one of the same depth would start with its networks
        seed = derived_seed(run.seed, index)
        model = make_model(replace(run, seed=seed, hyperparams={**run.hyperparams, **hyperparams}), env)
        assert isinstance(model, DeepCRL)
        models[name] = model
    return models


def learner_path(folder: Path, name: str, num_timesteps: int) -> Path:
    """
    :param folder: Folder of a run
    :param name: Name of a learner
    :param num_timesteps: Number of env steps of the model in that folder
    :return: File of the learner
    """
    return folder / f"learner-{name}-{num_timesteps}.zip"


def buffer_path(folder: Path, num_timesteps: int) -> Path:
    """
    :param folder: Folder of a run
    :param num_timesteps: Number of env steps of the model in that folder
    :return: File of its replay buffer
    """
    return folder / f"buffer-{num_timesteps}.pkl"


class Evaluations(BaseCallback):
    """
    Evaluate now and then, and save model, replay buffer and results each time, so that the run can go on from there.
    The clock, which is that of the processor, stands still meanwhile.

    :param run: What is trained
    :param folder: Its folder
    :param rows: Evaluations so far
    :param learners: Its learners
    """

    def __init__(self, run: Run, folder: Path, rows: list[dict[str, Any]], learners: Mapping[str, DeepCRL]):
        super().__init__()
        self.run, self.path, self.rows, self.learners = run, folder, rows, learners
        self.seconds_before = float(rows[-1]["seconds"]) if rows else 0.0
        self.seconds_off = 0.0

    def _on_training_start(self) -> None:
        self.start = time.process_time()

    def _on_step(self) -> bool:
        return True

    @property
    def _last(self) -> int:
        return int(self.rows[-1]["timesteps"]) if self.rows else 0

    def _on_rollout_start(self) -> None:
        # Here, where all transitions so far are in the replay buffer and all their updates are done: what is saved is whole
        if self.num_timesteps // self.run.eval_freq > self._last // self.run.eval_freq:
            self.evaluate()

    def _on_training_end(self) -> None:
        if self.num_timesteps > self._last:
            self.evaluate()

    def evaluate(self) -> None:
        """
        Evaluate and save now.
        """
        now = time.process_time()
        seconds = round(self.seconds_before + now - self.start - self.seconds_off, 1)
        env = make_env(self.run.eval_env, min(self.run.n_eval_episodes, 64), EVAL_SEED, self.run.eval_kwargs)
        for name, model in {**self.learners, COLLECTOR: self.model}.items():
            # The same episodes for all
            env.seed(EVAL_SEED)
            means = mean_of_episodes(evaluate_goals(model, env, self.run.n_eval_episodes))
            training = {measure: model.logger.name_to_value.get(f"train/{measure}") for measure in TRAINING_MEASURES}
            self.rows.append(
                {
                    **({"learner": name} if self.learners else {}),
                    "timesteps": self.num_timesteps,
                    "updates": model._n_updates,
                    "seconds": seconds,
                    **{measure: round(value, 4) for measure, value in means.items()},
                    **{measure: "" if value is None else round(float(value), 4) for measure, value in training.items()},
                }
            )
        env.close()
        self._save()
        self.seconds_off += time.process_time() - now

    def _save(self) -> None:
        assert isinstance(self.model, OffPolicyAlgorithm)
        buffer = buffer_path(self.path, self.num_timesteps)
        # Files, not paths, which DeepCRL would write by a temporary file of its own that nobody removes after a kill
        with atomic_path(buffer, ".pkl") as path, path.open("wb") as file:
            self.model.save_replay_buffer(file)
        learners = {learner_path(self.path, name, self.num_timesteps): model for name, model in self.learners.items()}
        for path, learner in learners.items():
            learner.save(path)
        # Which of the others count is for the model to say: killed in between, the run goes on from the previous ones
        with atomic_path(self.path / "model.zip", ".zip") as path, path.open("wb") as file:
            self.model.save(file)
        write_rows(self.path / "results.csv", self.rows)
        for path in {*self.path.glob("buffer-*.pkl"), *self.path.glob("learner-*.zip")} - {buffer, *learners}:
            path.unlink()


def results_of(run: Run, runs: Path) -> list[dict[str, str]]:
    """
    :param run: A run
    :param runs: Folder of all runs
    :return: Its evaluations so far, up to its number of steps
    """
    path = run.folder(runs) / "results.csv"
    rows = read_rows([path]) if path.exists() else []
    # It may have been continued by a longer one
    end = min((int(row["timesteps"]) for row in rows if int(row["timesteps"]) >= run.steps), default=run.steps)
    return [row for row in rows if int(row["timesteps"]) <= end]


def is_complete(run: Run, runs: Path) -> bool:
    """
    :param run: A run
    :param runs: Folder of all runs
    :return: Whether all its steps have been made
    """
    rows = results_of(run, runs)
    return bool(rows) and int(rows[-1]["timesteps"]) >= run.steps


def arguments(run: Run) -> dict[str, Any]:
    """
    :param run: A run
    :return: All that its models and envs are made with, defaults included, each under a name such as ``gamma``,
        ``policy_kwargs.norm`` or ``eval_env.maze``
    """
    algorithm = algorithm_class(run.algorithm)
    top = {**arguments_of(algorithm).defaults, "policy": "MultiInputPolicy", "n_envs": run.n_envs, **model_kwargs(run)}
    found = {name: value for name, value in top.items() if name not in ("seed", "device", "_init_setup_model")}
    for key, defaults in nested_arguments(run.algorithm).items():
        # What is an argument of the algorithm too comes from there
        own = {name: value for name, value in defaults.items() if name not in top}
        found.update({f"{key}.{name}": value for name, value in {**own, **(found.pop(key) or {})}.items()})
    for learner, hyperparams in run.learners.items():
        found.update({f"learners.{learner}.{name}": value for name, value in hyperparams.items()})
    for env, env_id, env_kwargs in (("env", run.env, run.env_kwargs), ("eval_env", run.eval_env, run.eval_kwargs)):
        spec = find_spec(env_id)
        values = {"id": env_id, "entry_point": spec.entry_point, **arguments_of_env(spec).defaults, **env_kwargs}
        found.update({f"{env}.{name}": value for name, value in values.items()})
    return {name: plain(value) for name, value in found.items()}


def made_with(run: Run, model: OffPolicyAlgorithm) -> dict[str, Any]:
    """
    :param run: What is trained
    :param model: Its model
    :return: What the run is made with from now on
    """

    def in_use(name: str, value: Any) -> Any:
        # A model that was loaded has brought its own
        own = getattr(model, name, value)
        return own if value != "auto" and isinstance(own, bool | int | float | str | None) else value

    return {
        "timesteps": model.num_timesteps,
        **code(),
        **machine(model),
        "packages": dependencies(),
        "arguments": {name: in_use(name, value) for name, value in arguments(run).items()},
    }


def _saved_records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    return settings.get("made_with", [{"timesteps": 0}])


def records_of(run: Run, runs: Path) -> list[dict[str, Any]]:
    """
    :param run: A run
    :param runs: Folder of all runs
    :return: What its steps so far were made with, see :func:`made_with`: one record, or several if it went on with other code
        or on another machine. A run that was made before there were records has one with nothing but ``timesteps``.
    """
    folder = run.folder(runs)
    if not any((folder / name).exists() for name in ("model.zip", "results.csv")):
        return []
    rows = results_of(run, runs)
    end = int(rows[-1]["timesteps"]) if rows else math.inf
    return [record for record in _saved_records(folder) if record["timesteps"] < end]


def _comparable(record: Mapping[str, Any]) -> dict[str, str]:
    values = {f"`{name}`": repr(value) for name, value in record["arguments"].items()}
    return {**values, "the version of sb3_deepcrl": record["version"], "its source": record["source"]}


def differences(run: Run, runs: Path) -> str:
    """
    :param run: A run
    :param runs: Folder of all runs
    :return: With what else it was made than there is now, in words; nothing if there is no difference, or it has not begun
    """
    records = records_of(run, runs)
    if not all("source" in record for record in records):
        return "unknown code, before runs recorded it"
    now = _comparable({"arguments": arguments(run), **code()}) if records else {}
    for record in records:
        then = _comparable(record)
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        if names:
            missing = "not there"
            changes = [f"{name} was {then.get(name, missing)}, now {now.get(name, missing)}" for name in names]
            return f"other code ({'; '.join(changes)})"
    return ""


def check_code(all_runs: Iterable[Run], runs: Path) -> None:
    """
    Check that runs were made with the code that is here, with the defaults that it has now.

    :param all_runs: Some runs, which need not have begun
    :param runs: Folder of all runs
    :raises ValueError: if one was not
    """
    others = {run.folder(runs): found for run in all_runs if (found := differences(run, runs))}
    if others:
        folder, found = next(iter(others.items()))
        more = f"; and {len(others) - 1} more of these runs with such code" if len(others) > 1 else ""
        raise ValueError(
            f"{folder} was made with {found}{more}. Use another folder (`runs`) to train anew, or `reuse_other_code` "
            "(--reuse-other-code) to take what is there as it is and go on from it"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Wait until no other process trains in a folder, such as another study with the same run, and keep others out.

    :param folder: Folder of a run
    """
    with (folder / "lock").open("w") as file:
        if os.name == "posix":
            import fcntl

            # Given back when the process ends, however it ends
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def train(run: Run, runs: Path, n_threads: int | None = None, reuse_other_code: bool = False) -> None:
    """
    Train, from the last evaluation on if there was one.

    :param run: What to train
    :param runs: Folder of all runs
    :param n_threads: Number of threads, as it is by default
    :param reuse_other_code: Whether what is there may have been made by other code than this
    :raises ValueError: if it was, but may not
    """
    if n_threads is not None:
        th.set_num_threads(n_threads)
    folder = run.folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not reuse_other_code:
            check_code([run], runs)
        if not is_complete(run, runs):
            _train(run, runs)


def _train(run: Run, runs: Path) -> None:
    folder = run.folder(runs)
    env = make_env(run.env, run.n_envs, run.seed, run.env_kwargs)
    rows: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    if (folder / "model.zip").exists():
        model = load_model(run, runs, env)
        records = [record for record in _saved_records(folder) if record["timesteps"] < model.num_timesteps]
        model.load_replay_buffer(buffer_path(folder, model.num_timesteps))
        learners = {name: DeepCRL.load(learner_path(folder, name, model.num_timesteps)) for name in run.learners}
        # Not the random numbers of the beginning again
        model.set_random_seed(derived_seed(run.seed, model.num_timesteps))
        if (folder / "results.csv").exists():
            rows = [row for row in read_rows([folder / "results.csv"]) if int(row["timesteps"]) <= model.num_timesteps]
    else:
        learners = make_learners(run, env)
        # The last to set the seeds of generators, so that these are the same with learners and without
        model = make_model(run, env)
        # Envs are seeded with consecutive numbers: with those of the model, seeds 0 and 1 would share all envs but one
        env.seed(derived_seed(run.seed, 0))
    record = made_with(run, model)
    if not records or {**records[-1], "timesteps": record["timesteps"]} != record:
        records.append(record)
    with atomic_path(folder / "run.json", ".json") as path:
        path.write_text(json.dumps({**asdict(run), "made_with": records}, indent=2, default=str) + "\n")
    model.learn(
        run.steps - model.num_timesteps,
        callback=[Learners(run, learners), Evaluations(run, folder, rows, learners)],
        log_interval=None,  # type: ignore[arg-type]
        reset_num_timesteps=False,
    )
    env.close()


def train_all(
    runs_by_label: Mapping[str, Sequence[Run]],
    runs: Path,
    jobs: int | None = None,
    train_function: Callable[[Run, Path, int | None], None] = train,
    console: Console | None = None,
    is_done: Callable[[Run, Path], bool] = is_complete,
    reuse_other_code: bool = False,
) -> None:
    """
    Train all runs that are not complete, several side by side, each with an equal part of the processor's cores.

    :param runs_by_label: The seeds of each setting
    :param runs: Folder of all runs
    :param jobs: How many at a time, by default as many as there are cores. One runs in this process.
    :param train_function: How to train one
    :param console: Where to show the progress, the terminal by default
    :param is_done: Whether a run needs no training
    :param reuse_other_code: Whether runs that are there may have been made by other code than this
    :raises ValueError: if one was, but may not
    """
    if reuse_other_code:
        train_function = functools.partial(train_function, reuse_other_code=True)  # type: ignore[call-arg]
    else:
        check_code([run for seeds in runs_by_label.values() for run in seeds], runs)
    all_runs = [(label, run) for label, seeds in runs_by_label.items() for run in seeds]
    # A run that belongs to two settings is trained once
    by_folder = {run.folder(runs): (label, run) for label, run in reversed(all_runs) if not is_done(run, runs)}
    open_runs = list(reversed(by_folder.values()))
    n_cores = n_usable_cores()
    jobs = max(1, min(jobs or n_cores, len(open_runs)))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = console or get_console()
    is_live = console.is_interactive or console.is_jupyter
    told: dict[Path, int] = {}
    with Progress(*columns, console=console, disable=not is_live) as progress:
        total = progress.add_task("env steps", total=sum(run.steps for _, run in all_runs))
        bars = {
            run.folder(runs): progress.add_task(f"{label}, seed {run.seed}", total=run.steps, visible=False, start=False)
            for label, run in open_runs
        }

        def refresh() -> None:
            done = 0
            lines = []
            for label, run in all_runs:
                rows = results_of(run, runs)
                steps = min(int(rows[-1]["timesteps"]), run.steps) if rows else 0
                done += steps
                if run.folder(runs) in bars and (run.folder(runs) / "run.json").exists():
                    bar = bars[run.folder(runs)]
                    progress.start_task(bar)
                    last = f", time at goal {float(rows[-1]['time_at_goal']):.0f}" if rows else ""
                    description = f"{label}, seed {run.seed}{last}"
                    progress.update(bar, completed=steps, visible=True, description=description)
                    if told.get(run.folder(runs)) != steps:
                        told[run.folder(runs)] = steps
                        lines.append(f"{description}, {steps:,} of {run.steps:,} env steps")
            progress.update(total, completed=done)
            if not is_live:
                # Such as in a log file
                elapsed = timedelta(seconds=int(progress.tasks[total].elapsed or 0))
                part = f"{progress.tasks[total].percentage:.0f} % of all"
                for line in lines:
                    console.print(f"{elapsed} {line}; {part}", soft_wrap=True, highlight=False)

        if not is_live:
            console.print(f"{len(all_runs)} runs, {len(open_runs)} to train", highlight=False)
        refresh()
        if jobs == 1:
            with called_every_second(refresh):
                for _, run in open_runs:
                    train_function(run, runs, None)
            return
        train_side_by_side(
            [(f"{label}, seed {run.seed}", (run, runs, max(1, n_cores // jobs))) for label, run in open_runs],
            train_function,
            jobs,
            refresh,
        )


@contextmanager
def called_every_second(function: Callable[[], None]) -> Iterator[None]:
    """
    :param function: What to call from another thread while the context lasts, and at its end
    """
    ended = threading.Event()

    def call() -> None:
        while not ended.wait(1):
            function()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        function()


def train_side_by_side(
    calls: Sequence[tuple[str, tuple[Run, Path, int | None]]],
    train_function: Callable[[Run, Path, int | None], None],
    jobs: int,
    refresh: Callable[[], None],
) -> None:
    """
    Train in processes of their own. If one fails, or this process is interrupted or killed, all of them are stopped.

    :param calls: Name and arguments of each call
    :param train_function: What is called
    :param jobs: How many at a time
    :param refresh: Called about every second and when a call has ended
    :raises ChildProcessError: if a process was killed
    """
    # Not forks: threads of PyTorch do not survive a fork
    context = get_context("spawn")
    waiting = list(calls)
    running: dict[str, tuple[SpawnProcess, Connection]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, arguments = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_call_and_report, args=(sender, train_function, arguments))
                process.start()
                # The receiver learns of the end of the process only if this is the other's alone
                sender.close()
                running[name] = process, receiver
            connection.wait([receiver for _, receiver in running.values()], timeout=1)
            refresh()
            for name, (process, receiver) in list(running.items()):
                if process.is_alive() and not receiver.poll():
                    continue
                if (error := _receive(receiver)) is not None:
                    raise error
                process.join()
                if process.exitcode != 0:
                    raise ChildProcessError(
                        f"The process of {name!r} ended with exit code {process.exitcode}. If it was killed for lack of "
                        "memory, use fewer `jobs`. The next call goes on from the last evaluations"
                    )
                del running[name]
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join(SECONDS_TO_END)
            process.kill()
            process.join()


def _receive(receiver: Connection) -> Exception | None:
    """
    :param receiver: Where a process reports that has ended, or is about to
    :return: The exception, None if there is none
    """
    try:
        return receiver.recv()
    except EOFError:
        # It ended without a report
        return None


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os._exit(1)


def _end(*_: Any) -> None:
    # Not an exception, which may come in the middle of an import, or where it is ignored. Nothing is lost: files are written
    # as a whole. What is left to do is to give back semaphores, or there is a warning.
    util._exit_function()  # type: ignore[attr-defined]
    os._exit(1)


def _call_and_report(sender: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """
    :param sender: Where to send an exception, with its traceback as a note unless what it says is for the user
    :param function: What to call
    :param arguments: Its arguments
    """
    # Signals of a terminal, such as Ctrl-C, come here too, but it is the other process that stops this one
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function(*arguments)
    except Exception as error:
        notes = [] if is_for_user(error) else [traceback.format_exc()]
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            # An exception that cannot be sent: what it says can
            error = RuntimeError(f"{type(error).__name__}: {error}")
        for note in notes:
            error.add_note(note)
        sender.send(error)


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
