import time
from collections import deque

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback


class TrainingDisplay(BaseCallback):
    """
    Live display of a goal-conditioned training: success rate and time at goal of the last training episodes,
    contrastive accuracy, steps per second and time left.

    Success is read from ``info["is_success"]`` or ``info["success"]``.

    :param stats_window_size: Number of episodes to average over
    :param console: Where to show it, the terminal by default
    """

    def __init__(self, stats_window_size: int = 50, console: Console | None = None):
        super().__init__()
        self.console = console
        # One entry an episode: whether the goal was reached, and the fraction of steps at the goal
        self.successes: deque[bool] = deque(maxlen=stats_window_size)
        self.times_at_goal: deque[float] = deque(maxlen=stats_window_size)
        self.accuracy: float | None = None
        self._live: Live | None = None

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
        self._live = Live(self._render(), console=self.console, refresh_per_second=4)
        self._live.start()

    def _render(self) -> Group:
        elapsed = max(time.monotonic() - self._start_time, 1e-9)

        def percent(values: deque) -> str:
            return f"{100 * np.mean(values):.0f} %" if values else "-"

        table = Table.grid(padding=(0, 3))
        table.add_row("success", "time at goal", "contrastive accuracy", "updates", "steps/s", style="dim")
        table.add_row(
            percent(self.successes),
            percent(self.times_at_goal),
            "-" if self.accuracy is None else f"{100 * self.accuracy:.0f} %",
            f"{self.model._n_updates}",
            f"{(self.num_timesteps - self._start_timesteps) / elapsed:.0f}",
        )
        return Group(table, self._progress)

    def _on_rollout_start(self) -> None:
        # Right after an update, before the logger is dumped
        self.accuracy = self.logger.name_to_value.get("train/categorical_accuracy", self.accuracy)
        self._progress.update(self._task, completed=min(self.num_timesteps, self.locals["total_timesteps"]))
        if self._live is not None:
            self._live.update(self._render())

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
        if self._live is None:
            return
        self._progress.update(self._task, completed=min(self.num_timesteps, self.locals["total_timesteps"]))
        self._live.update(self._render())
        self._live.stop()
        if not self._live.console.is_terminal:
            # Rich ends the line on a terminal only
            self._live.console.line()
        self._live = None

    def _on_training_end(self) -> None:
        self.stop()
