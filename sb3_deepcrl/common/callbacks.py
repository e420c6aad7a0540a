import sys
import time
from collections import deque
from datetime import timedelta

import numpy as np
from rich import get_console
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat


class TrainingDisplay(BaseCallback):
    """
    Live display of a goal-conditioned training: success at any step and time at goal of the last training episodes,
    categorical accuracy, steps per second and time left. Where there is no terminal, such as in a log file, it is a line every
    minute and for every tenth of the steps.

    Success is read from ``info["is_success"]`` or ``info["success"]``.

    :param stats_window_size: Number of episodes to average over
    :param console: Where to show it, the standard output by default
    :param replaces_tables: Whether it takes the place of the tables on the standard output. Other outputs of the logger stay.
    """

    def __init__(self, stats_window_size: int = 50, console: Console | None = None, replaces_tables: bool = False):
        super().__init__()
        self.console = console or get_console()
        self.replaces_tables = replaces_tables
        # One entry an episode: whether the goal was reached, and the fraction of steps at the goal
        self.successes: deque[bool] = deque(maxlen=stats_window_size)
        self.times_at_goal: deque[float] = deque(maxlen=stats_window_size)
        self.accuracy: float | None = None
        self._live: Live | None = None
        self._is_shown = False
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
        self._steps_at_goal = np.zeros(self.training_env.num_envs)
        self._episode_steps = np.zeros(self.training_env.num_envs)
        self._start_time, self._start_timesteps = time.monotonic(), self.num_timesteps
        self._progress = Progress(
            TextColumn("env steps"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("", total=self.locals["total_timesteps"], completed=self.num_timesteps)
        if self.console.is_interactive or self.console.is_jupyter:
            self._live = Live(self._render(), console=self.console, refresh_per_second=4)
            self._live.start()
        self._is_shown = True
        self._show(is_due=True)

    def _measures(self) -> dict[str, str]:
        def percent(values: deque) -> str:
            return f"{100 * np.mean(values):.0f} %" if values else "-"

        elapsed = max(time.monotonic() - self._start_time, 1e-9)
        measures = {"success at any step": percent(self.successes), "time at goal": percent(self.times_at_goal)}
        # Other algorithms have none
        if hasattr(self.model, "contrastive_loss"):
            # Chance: guessing which goal of the minibatch belongs to a state and an action
            chance = 100 / self.model.batch_size  # type: ignore[attr-defined]
            accuracy = "-" if self.accuracy is None else f"{100 * self.accuracy:.0f} % (chance {chance:.2g} %)"
            measures["categorical accuracy"] = accuracy
        return {
            **measures,
            "updates": f"{self.model._n_updates:,}",
            "steps/s": f"{(self.num_timesteps - self._start_timesteps) / elapsed:.0f}",
        }

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 3))
        measures = self._measures()
        table.add_row(*measures, style="dim")
        table.add_row(*measures.values())
        return Group(table, self._progress)

    def _show(self, is_due: bool = False) -> None:
        """
        :param is_due: Whether to write a line where there is no terminal, even if the last one was a moment ago
        """
        # At the start of a rollout, right after an update, the logger has not been dumped yet
        self.accuracy = self.logger.name_to_value.get("train/categorical_accuracy", self.accuracy)
        total = self.locals["total_timesteps"]
        done = min(self.num_timesteps, total)
        self._progress.update(self._task, completed=done)
        if self._live is not None:
            self._live.update(self._render())
        elif is_due or done >= self._last_line[0] + 0.1 * total or time.monotonic() > self._last_line[1] + 60:
            self._last_line = done, time.monotonic()
            remaining = self._progress.tasks[0].time_remaining
            left = "-" if remaining is None else timedelta(seconds=round(remaining))
            measures = ", ".join(f"{name} {value}" for name, value in self._measures().items())
            # Where nobody reads it any more, rich would end the program without an error
            print(f"{done:,}/{total:,} env steps, {measures}, left {left}", file=self.console.file, flush=True)

    def _on_rollout_start(self) -> None:
        self._show()

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        self._steps_at_goal += [bool(info.get("is_success", info.get("success", False))) for info in infos]
        self._episode_steps += 1
        # VecEnvs of simulators return them as numbers, lists or tensors
        dones = np.asarray(self.locals["dones"], dtype=bool).reshape(-1)
        for index in np.flatnonzero(dones):
            self.successes.append(bool(self._steps_at_goal[index] > 0))
            self.times_at_goal.append(self._steps_at_goal[index] / self._episode_steps[index])
        self._steps_at_goal[dones] = 0
        self._episode_steps[dones] = 0
        return True

    def stop(self) -> None:
        """
        Leave the terminal as it was. Called at the end of the training, and to be called when it was interrupted.
        """
        if not self._is_shown:
            return
        self._show(is_due=True)
        if self._live is not None:
            self._live.stop()
        self._live, self._is_shown = None, False

    def _on_training_end(self) -> None:
        self.stop()
