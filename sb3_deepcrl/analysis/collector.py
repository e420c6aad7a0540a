"""
Does depth pay because a deep policy collects better data, or because a deep network learns more from data?
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch as th
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import TrainFreq

from sb3_deepcrl import GoalEvalCallback
from sb3_deepcrl.analysis.episodes import make_envs
from sb3_deepcrl.analysis.report import MEASURES, Report, Results, depth_colors, draw_curve, new_figure
from sb3_deepcrl.analysis.runs import FOLDER, Run, mean_evaluations
from sb3_deepcrl.analysis.statistics import Estimate, curves_of
from sb3_deepcrl.analysis.study import Study
from sb3_deepcrl.common.utils import WITHOUT_BUFFER, check_depth
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.deploy.distillation import make_student


@contextlib.contextmanager
def _own_random_numbers(*seeds: int) -> Iterator[None]:
    """Draw random numbers that change nothing for others."""
    state = np.random.get_state()
    first, second = np.random.SeedSequence(seeds).generate_state(2)
    with th.random.fork_rng():
        np.random.seed(first)
        th.manual_seed(int(second))
        try:
            yield
        finally:
            np.random.set_state(state)


@dataclass(eq=False)
class Learners(BaseCallback):
    """
    Models of other depths that learn from the replay buffer of the model in training, the collector: as many updates, each
    right after those of the collector, on minibatches of their own. They don't act, and the collector learns what it learns
    without them. Each has a folder of its own in ``folder`` for its evaluations, and for what a run that is stopped goes on
    with: it is saved after each of them, which are every ``eval_freq`` env steps.
    """

    depths: Sequence[int]
    folder: str
    eval_env: str
    eval_freq: int
    n_eval_episodes: int
    env_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.learners: dict[int, DeepCRL] = {}
        self.evaluations: dict[int, GoalEvalCallback] = {}

    def _init_callback(self) -> None:
        if not isinstance(self.model, DeepCRL) or self.model.get_vec_normalize_env() is not None:
            raise ValueError("Learners share the replay buffer of DeepCRL, without `normalize`: leave it out")
        for depth in self.depths:
            learner = self.learners[depth] = self._find(depth) or self._make(depth)
            learner.replay_buffer = self.model.replay_buffer
            learner.num_timesteps = self.model.num_timesteps
            learner.set_logger(Logger(None, []))
            self.evaluations[depth] = GoalEvalCallback(
                make_envs(self.eval_env, min(self.n_eval_episodes, 64), self.env_kwargs),
                n_eval_episodes=self.n_eval_episodes,
                eval_freq=max(self.eval_freq // self.training_env.num_envs, 1),
                log_path=str(_learner_folder(self.folder, depth)),
                resume=True,
                verbose=0,
            )
            self.evaluations[depth].init_callback(learner)

    def _find(self, depth: int) -> DeepCRL | None:
        """The newest saved model that is not ahead of the collector."""
        paths = [path for path in _saved(self.folder, depth) if int(path.stem) <= self.model.num_timesteps]
        # What it lacks is made up for before the next rollout
        return DeepCRL.load(paths[-1], self.training_env, custom_objects=WITHOUT_BUFFER) if paths else None

    def _make(self, depth: int) -> DeepCRL:
        assert isinstance(self.model, DeepCRL)
        # Not the networks of the collector, if that is as deep; a seed would be that of the envs too
        with _own_random_numbers(self.model.seed or 0, depth):
            return make_student(self.model, depth, env=self.training_env, seed=None)

    def _on_training_start(self) -> None:
        collector = self.model
        assert isinstance(collector, DeepCRL) and isinstance(collector.train_freq, TrainFreq)
        rollout = collector.train_freq.frequency * self.training_env.num_envs
        for depth, learner in self.learners.items():
            # As `learn()` does, which they never see
            learner._setup_acceleration(self.locals["total_timesteps"] * max(collector.gradient_steps, 1) // rollout)
            self.evaluations[depth].on_training_start(self.locals, self.globals)

    def _on_step(self) -> bool:
        for depth, learner in self.learners.items():
            learner.num_timesteps = self.num_timesteps
            evaluations = self.evaluations[depth]
            evaluations.on_step()
            if evaluations.n_calls % evaluations.eval_freq == 0:
                # The collector may not be saved yet, and goes on with the previous one then
                for path in _saved(self.folder, depth)[:-1]:
                    path.unlink()
                learner.save(_learner_folder(self.folder, depth) / f"{self.num_timesteps}.zip")
        return True

    def _on_rollout_start(self) -> None:
        assert isinstance(self.model, DeepCRL)
        statistics = self.model.actor.normalizer
        # Counters of Stable-Baselines3 that nothing public tells or sets
        for depth, learner in self.learners.items():
            learner._current_progress_remaining = self.model._current_progress_remaining
            if statistics is not None and learner.actor.normalizer is not None:
                # Those of what was collected
                learner.actor.normalizer.load_state_dict(statistics.state_dict())
            with _own_random_numbers(self.model.seed or 0, depth, self.num_timesteps):
                learner.train(self.model._n_updates - learner._n_updates, learner.batch_size)
            self.evaluations[depth].on_rollout_start()

    _on_training_end = _on_rollout_start


def _learner_folder(folder: Path | str, depth: int) -> Path:
    """Where a learner has its evaluations and models."""
    return Path(folder) / f"learner-depth-{depth}"


def _saved(folder: str, depth: int) -> list[Path]:
    """Its models, which are named by their number of steps, the newest last."""
    return sorted(_learner_folder(folder, depth).glob("*.zip"), key=lambda path: int(path.stem))


@dataclass(kw_only=True)
class CollectorStudy(Study):
    """
    Does depth pay by better data or learning? (figure 8)

    Does it pay because a deep policy collects better data, or because a deep network learns more from data? A deep and then
    a shallow model, the collector, acts and fills the only replay buffer. A deep and a shallow learner train from it at the
    same time, with as many updates, and never act.
    """

    name: ClassVar[str] = "collector"

    deep: int = 32
    """Depth of the deep collector and learner"""
    shallow: int = 4
    """Depth of the shallow collector and learner"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth(self.deep, "deep")
        check_depth(self.shallow, "shallow")
        if self.deep <= self.shallow:
            raise ValueError(f"`deep` must be larger than `shallow`, got {self.deep} and {self.shallow}")

    @property
    def _depths(self) -> tuple[int, int]:
        return self.deep, self.shallow

    def settings(self) -> dict[str, Run]:
        arguments = {
            "depths": self._depths,
            "folder": FOLDER,
            "eval_env": self.eval_env,
            "eval_freq": self.eval_freq,
            "n_eval_episodes": self.n_eval_episodes,
            "env_kwargs": self.all_eval_env_kwargs,
        }
        callback = [{f"{Learners.__module__}.{Learners.__name__}": arguments}]
        return {f"collector depth {depth}": self.make_run(depth=depth, callback=callback) for depth in self._depths}

    def report(self, results: Results) -> Report:
        from sb3_deepcrl.zoo.runs import RunFolder

        everyone: Results = {}
        for label, run in self.settings().items():
            everyone[f"{label}, itself"] = results[label]
            for depth in self._depths:
                everyone[f"{label}, learner depth {depth}"] = [
                    mean_evaluations(RunFolder(_learner_folder(seed.folder(self.runs), depth)), self.steps)
                    for seed in self.seeds_of(run)
                ]
        return super().report(everyone)

    def protocol(self) -> str:
        return (
            "Only the collector acts in training; the learners train from its replay buffer, each on minibatches of its own. "
            f"{super().protocol()} They are those of the collector and both learners together."
        )

    def compare(self, estimates: dict[str, Estimate]) -> list[str]:
        def difference(what: str, first: tuple[int, int], second: tuple[int, int]) -> str:
            one, other = (estimates["collector depth {}, learner depth {}".format(*pair)] for pair in (first, second))
            return f"{what} {self.deep} against {self.shallow}: {one} against {other}, {one.compare(other)}."

        return [
            *(difference(f"From the data of collector {d}, learner", (d, self.deep), (d, self.shallow)) for d in self._depths),
            *(difference(f"Learner {d}, from the data of collector", (self.deep, d), (self.shallow, d)) for d in self._depths),
        ]

    def draw(self, results: Results) -> Figure:
        figure, axes = new_figure(1, 2)
        colors = depth_colors(self._depths)
        lines = [(f"learner depth {depth}", f"learner, depth {depth}", colors[depth], "-") for depth in self._depths]
        for ax, collector, kind in zip(axes[0], self._depths, ("Deep", "Shallow"), strict=True):
            for who, name, color, style in (*lines, ("itself", "the collector itself", "0.5", ":")):
                seeds = results[f"collector depth {collector}, {who}"]
                steps = curves_of(seeds, "timesteps").mean(axis=0) / 1000
                draw_curve(ax, steps, curves_of(seeds, "time_at_goal"), name, color, style)
            ax.set(xlabel="env steps (thousands)", ylabel=MEASURES["time_at_goal"])
            ax.set_title(f"{kind} collector (depth {collector})")
        top = max(ax.get_ylim()[1] for ax in axes[0])
        for ax in axes[0]:
            ax.set_ylim(0, top)
        axes[0, 0].legend()
        return figure
