import io
import math
import os
import sys
import time
import zipfile
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich import get_console
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import HumanOutputFormat
from stable_baselines3.common.vec_env import VecEnv

from sb3_deepcrl.common.distributed import n_envs_of_run
from sb3_deepcrl.common.evaluation import GoalEpisodeRecorder, mean_of_episodes
from sb3_deepcrl.common.losses import NETWORK_METRICS
from sb3_deepcrl.common.tensor_env import LazyArray
from sb3_deepcrl.common.utils import atomic_path, check_positive_int, evaluates_in

# What the logger holds of the last update, where the algorithm has it
TRAINING_MEASURES = ("critic_loss", "categorical_accuracy", "ent_coef", "entropy", *NETWORK_METRICS)
GOAL_MEASURES = ("success_any", "success_last", "time_at_goal", "time_at_goal_fraction", "mean_distance")


class TrainingDisplay(BaseCallback):
    """
    Live display of a goal-conditioned training: success at any step and time at goal of the last 50 training episodes,
    categorical accuracy, steps per second and time left. Where there is no terminal, such as in a log file, it is a line every
    minute and for every tenth of the steps.

    Success is read from ``info["is_success"]`` or ``info["success"]``.

    :param replaces_tables: Whether it takes the place of the tables on the standard output. Other outputs of the logger stay.
    """

    def __init__(self, replaces_tables: bool = False):
        super().__init__()
        self.replaces_tables = replaces_tables
        # One entry an episode: whether the goal was reached, and the fraction of steps at the goal
        self.successes: deque[bool] = deque(maxlen=50)
        self.times_at_goal: deque[float] = deque(maxlen=50)
        self.accuracy: float | None = None
        self._progress: Progress | None = None
        self._live: Live | None = None
        # Where there is no terminal: steps and time of the last line
        self._last_line = 0, 0.0

    def _init_callback(self) -> None:
        if self.replaces_tables:
            self.logger.output_formats = [
                output
                for output in self.logger.output_formats
                if not (isinstance(output, HumanOutputFormat) and output.file is sys.stdout)
            ]

    def _on_training_start(self) -> None:
        self._steps_at_goal = np.zeros(n_envs_of_run(self.model))
        self._episode_steps = np.zeros(n_envs_of_run(self.model))
        self._start_time, self._start_timesteps = time.monotonic(), self.num_timesteps
        columns = ("env steps", BarColumn(bar_width=None), MofNCompleteColumn(), TaskProgressColumn(), "left")
        self._progress = Progress(*columns, TimeRemainingColumn(), console=get_console())
        self._progress.add_task("", total=self.locals["total_timesteps"], completed=self.num_timesteps)
        if self._progress.console.is_interactive or self._progress.console.is_jupyter:
            self._live = Live(console=self._progress.console)
            self._live.start()
        self._show(is_due=True)

    def _measures(self) -> str:
        def percent(values: deque) -> str:
            return f"{100 * np.mean(values):.0f} %" if values else "-"

        measures = {"success at any step": percent(self.successes), "time at goal": percent(self.times_at_goal)}
        # Other algorithms have none
        if hasattr(self.model, "contrastive_loss"):
            # Chance: guessing which goal of the minibatch belongs to a state and an action
            chance = 100 / self.model.batch_size  # type: ignore[attr-defined]
            accuracy = "-" if self.accuracy is None else f"{100 * self.accuracy:.0f} % (chance {chance:.2g} %)"
            measures["categorical accuracy"] = accuracy
        # There is no public name of the number of updates
        measures["updates"] = f"{self.model._n_updates:,}"
        elapsed = max(time.monotonic() - self._start_time, 1e-9)
        measures["steps/s"] = f"{(self.num_timesteps - self._start_timesteps) / elapsed:.0f}"
        return ", ".join(f"{name} {value}" for name, value in measures.items())

    def _show(self, is_due: bool = False) -> None:
        """Show the measures; where there is no terminal, as a line if it is due or the last one was a while ago."""
        # At the start of a rollout, right after an update, the logger has not been dumped yet
        self.accuracy = self.logger.name_to_value.get("train/categorical_accuracy", self.accuracy)
        total = self.locals["total_timesteps"]
        done = min(self.num_timesteps, total)
        assert self._progress is not None
        task = self._progress.tasks[0]
        self._progress.update(task.id, completed=done)
        if self._live is not None:
            self._live.update(Group(self._measures(), self._progress))
        elif is_due or done >= self._last_line[0] + 0.1 * total or time.monotonic() > self._last_line[1] + 60:
            self._last_line = done, time.monotonic()
            left = "-" if task.time_remaining is None else timedelta(seconds=round(task.time_remaining))
            text = f"{done:,}/{total:,} env steps, {self._measures()}, left {left}"
            # Where nobody reads it any more, rich would end the program without an error
            print(text, file=self._progress.console.file, flush=True)

    def _on_rollout_start(self) -> None:
        self._show()

    def _on_rollout_end(self) -> None:
        if isinstance(self.locals["dones"], LazyArray):
            for info in self.locals["episode_infos"]:
                self.successes.append(info.get("time_at_goal", 0) > 0)
                self.times_at_goal.append(info.get("time_at_goal", 0) / info["episode"]["l"])

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        if isinstance(self.locals["dones"], LazyArray):
            # They come at the end of the rollout
            return True
        self._steps_at_goal += [bool(info.get("is_success", info.get("success", False))) for info in infos]
        self._episode_steps += 1
        # VecEnvs of simulators return them as numbers, lists or tensors
        dones = np.asarray(self.locals["dones"], dtype=bool).reshape(-1)
        for i in np.flatnonzero(dones):
            # Where only the end of an episode has an info
            self._steps_at_goal[i] = infos[i].get("time_at_goal", self._steps_at_goal[i])
        self.successes.extend(self._steps_at_goal[dones] > 0)
        self.times_at_goal.extend(self._steps_at_goal[dones] / self._episode_steps[dones])
        self._steps_at_goal[dones] = self._episode_steps[dones] = 0
        return True

    def stop(self) -> None:
        """Leave the terminal as it was. Called at the end of the training, and to be called when it was interrupted."""
        if self._progress is not None:
            self._show(is_due=True)
            if self._live is not None:
                self._live.stop()
            self._progress = self._live = None

    def _on_training_end(self) -> None:
        self.stop()


class ResumableEvalCallback(EvalCallback):
    """
    Callback for evaluating an agent whose training may stop and go on: what
    :class:`~stable_baselines3.common.callbacks.EvalCallback` does, but ``evaluations.npz`` is written as a whole or not at
    all, can be continued, and tells more of each evaluation. Besides Stable-Baselines3's ``timesteps``, and ``results``,
    ``ep_lengths`` and ``successes`` of shape ``(n_evaluations, n_eval_episodes)``, it holds arrays of shape
    ``(n_evaluations,)``:

    - ``n_updates``: number of updates so far
    - ``seconds``: CPU seconds of this process that training took so far, without evaluations
    - ``critic_loss``, ``categorical_accuracy``, ``ent_coef``, ``entropy``, ``actor_output``, ``actor_grad_norm`` and
      ``critic_grad_norm``: what was logged of the last update, or NaN

    :param eval_env: The environment used for evaluation, another one than that for training
    :param args: Other positional arguments of ``EvalCallback``
    :param resume: Whether to go on from ``evaluations.npz`` in ``log_path``, if there is one. What is in it of later steps
        than the model has is left out. The next evaluation is done when it would have been without the stop.
    :param evaluate_first: Whether to evaluate before the first step too
    :param kwargs: Other keyword arguments of ``EvalCallback``
    :raises ValueError: if the evaluations in ``log_path`` cannot be continued, or ``eval_env`` is the env of training
    """

    def __init__(
        self, eval_env: gym.Env | VecEnv, *args: Any, resume: bool = False, evaluate_first: bool = False, **kwargs: Any
    ):
        super().__init__(eval_env, *args, **kwargs)
        check_positive_int(self.n_eval_episodes, "n_eval_episodes")
        self.resume = resume
        self.evaluate_first = evaluate_first
        if resume:
            # What cannot be continued is refused before anything is done
            self._read_evaluations()
        # One entry an evaluation of what Stable-Baselines3 does not record
        self.evaluations_measures: dict[str, list[Any]] = {}
        self._training_measures = dict.fromkeys(TRAINING_MEASURES, math.nan)
        self._seconds = 0.0

    def _init_callback(self) -> None:
        if evaluates_in(self, self.training_env):
            raise ValueError(
                "`eval_env` is the env that the model is trained in: to evaluate would end the episode that is running there. "
                "Make another one"
            )
        super()._init_callback()
        if self.resume:
            self.n_calls = self.model.num_timesteps // n_envs_of_run(self.model)
            if arrays := self._read_evaluations():
                self._continue(arrays)

    def _read_evaluations(self) -> dict[str, np.ndarray]:
        """Evaluations to go on from, empty if there are none."""
        path = Path(f"{self.log_path}.npz")
        if self.log_path is None or not path.is_file():
            return {}
        with np.load(path) as file:
            arrays = dict(file)
        if "seconds" not in arrays:
            raise ValueError(f"{path} was written by another callback, and cannot be continued: use another folder")
        if len(arrays["timesteps"]) == 0:
            return {}
        n_episodes = arrays["results"].shape[1]
        if n_episodes != self.n_eval_episodes:
            raise ValueError(
                f"`n_eval_episodes={self.n_eval_episodes}`, but the evaluations in {path}, which are continued, have "
                f"{n_episodes} episodes each: use `n_eval_episodes={n_episodes}`, or another folder"
            )
        return arrays

    def _continue(self, arrays: dict[str, np.ndarray]) -> None:
        # The best model may be of an evaluation that is done again
        if self.best_model_save_path is None or os.path.isfile(os.path.join(self.best_model_save_path, "best_model.zip")):
            self.best_mean_reward = float(arrays["results"].mean(axis=1).max())
        is_done = arrays["timesteps"] <= self.model.num_timesteps
        arrays = {name: values[is_done] for name, values in arrays.items()}
        self._write_evaluations(arrays)
        lists = {name: values.tolist() for name, values in arrays.items()}
        self.evaluations_timesteps = lists.pop("timesteps")
        self.evaluations_results = lists.pop("results")
        self.evaluations_length = lists.pop("ep_lengths")
        self.evaluations_successes = lists.pop("successes", [])
        # Older files may lack one of them
        n_evaluations = len(self.evaluations_timesteps)
        self.evaluations_measures = {name: [math.nan] * n_evaluations for name in TRAINING_MEASURES} | lists
        self._seconds = max(lists["seconds"], default=0.0)

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._clock = time.process_time()
        # Stopped in the middle of it, or asked for
        is_due = (self.resume and self.n_calls > 0) or (self.evaluate_first and self.num_timesteps == 0)
        is_due = is_due and self.eval_freq > 0 and self.n_calls % self.eval_freq == 0
        if is_due and self.num_timesteps not in self.evaluations_timesteps:
            self._on_step()

    def _on_rollout_start(self) -> None:
        super()._on_rollout_start()
        # Right after an update, the logger has not been dumped yet
        for name in TRAINING_MEASURES:
            self._training_measures[name] = self.logger.name_to_value.get(f"train/{name}", self._training_measures[name])

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True
        self._seconds += time.process_time() - self._clock
        # The parent's own file would lack the other measures, and be broken if the process is killed while it is written
        log_path, file = self.log_path, io.BytesIO()
        if log_path is not None:
            self.log_path = file  # type: ignore[assignment]
        try:
            return self._evaluate()
        finally:
            self.log_path = log_path
            # Not if the evaluation was interrupted
            if zipfile.is_zipfile(file):
                for name, value in self._measures().items():
                    self.evaluations_measures.setdefault(name, []).append(value)
                file.seek(0)
                self._write_evaluations({**np.load(file), **self.evaluations_measures})
            self._clock = time.process_time()

    def _evaluate(self) -> bool:
        return super()._on_step()

    def _measures(self) -> dict[str, Any]:
        """What to save of the evaluation that was just done."""
        return {"n_updates": self.model._n_updates, "seconds": self._seconds, **self._training_measures}

    def _write_evaluations(self, arrays: dict[str, Any]) -> None:
        with atomic_path(self.log_path, ".npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)


class GoalEvalCallback(ResumableEvalCallback):
    """
    Callback for evaluating a goal-conditioned agent: what :class:`ResumableEvalCallback` does, and the measures of
    :class:`~sb3_deepcrl.common.evaluation.GoalEpisode`, logged as ``eval/success_any``, ``eval/success_last``,
    ``eval/time_at_goal`` (steps), ``eval/time_at_goal_fraction`` and ``eval/mean_distance``, and saved in ``evaluations.npz``
    with these names, of shape ``(n_evaluations, n_eval_episodes)``. ``eval/success_rate``, and ``successes`` in the file, are
    Stable-Baselines3's names of the success at the last step.

    :param eval_env: The environment used for evaluation, another one than that for training
    :param args: Other positional arguments of :class:`ResumableEvalCallback`
    :param kwargs: Other keyword arguments of it
    :raises ValueError: as there, or if the env has no goals
    """

    def __init__(self, eval_env: gym.Env | VecEnv, *args: Any, **kwargs: Any):
        super().__init__(eval_env, *args, **kwargs)
        # Raises if there are no goals
        self._recorder = GoalEpisodeRecorder(self.eval_env)
        self.last_means: dict[str, float] = {}

    def _evaluate(self) -> bool:
        # An evaluation that was interrupted leaves nothing behind
        self._recorder = GoalEpisodeRecorder(self.eval_env)
        best_mean_reward, verbose = self.best_mean_reward, self.verbose
        # The parent prints success at the last step as "Success rate"
        self.verbose = 0
        try:
            continue_training = super()._evaluate()
        finally:
            self.verbose = verbose
        if verbose >= 1:
            means = self.last_means
            print(
                f"Eval num_timesteps={self.num_timesteps}: success {100 * means['success_any']:.0f} % at any step, "
                f"{100 * means['success_last']:.0f} % at the last step, time at goal {means['time_at_goal']:.1f} of "
                f"{means['episode_length']:.0f} steps, episode reward {means['episode_reward']:.2f}"
                + (" (new best)" if self.best_mean_reward > best_mean_reward else "")
            )
        return continue_training

    def _log_success_callback(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        self._recorder(locals_, globals_)
        if locals_["done"]:
            # The parent reads `is_success` only
            self._is_success_buffer.append(self._recorder.episodes[-1].success_last)
        # The parent dumps the logger before it gives the control back
        if len(self._recorder.episodes) == self.n_eval_episodes:
            self.last_means = mean_of_episodes(self._recorder.episodes)
            for name in GOAL_MEASURES:
                self.logger.record(f"eval/{name}", self.last_means[name])

    def _measures(self) -> dict[str, Any]:
        episodes = self._recorder.episodes
        return {**super()._measures(), **{name: [getattr(episode, name) for episode in episodes] for name in GOAL_MEASURES}}
