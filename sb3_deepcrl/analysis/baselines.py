from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from sb3_deepcrl.analysis.runs import ALGORITHMS, Run, check_hyperparams, make_env
from sb3_deepcrl.analysis.statistics import Estimate
from sb3_deepcrl.analysis.study import (
    ComparisonOfDepths,
    Report,
    Results,
    depth_colors,
    draw_learning_curves,
    final_estimate,
    option,
    rows_of,
    summarize,
)

BASELINES = tuple(algorithm for algorithm in ALGORITHMS if algorithm != "DeepCRL")
# DeepCRL's first temperature, and the defaults of HER
HYPERPARAMS = {
    "ent_coef": "auto_0.1",
    "replay_buffer_kwargs": {"n_sampled_goal": 4, "goal_selection_strategy": "future"},
}


def first_update(n_envs: int, episode_steps: int | None, steps: int, learning_starts: int | None) -> int:
    """
    :param n_envs: Number of envs
    :param episode_steps: Longest episode, None if there is no limit
    :param steps: Number of env steps of the run
    :param learning_starts: What the user asks for, None for the smallest possible
    :return: ``learning_starts`` for HER, which samples finished episodes only
    :raises ValueError: if there is none, or the run would end before
    """
    least = 0 if episode_steps is None else n_envs * episode_steps
    if learning_starts is None and episode_steps is None:
        raise ValueError(
            "The env has no limit of steps, so that there is no telling when the first episode ends, before which HER cannot "
            "learn: set it with `baseline_hyperparams`, e.g. learning_starts:10000"
        )
    starts = least if learning_starts is None else learning_starts
    if starts < least:
        raise ValueError(
            f"`learning_starts` of the baselines is {starts}, but HER samples finished episodes only: with {n_envs} envs and "
            f"episodes of {episode_steps} steps use at least {least}"
        )
    if steps <= starts:
        raise ValueError(
            f"`steps` must be more than the {starts} with which the baselines start to learn ({n_envs} envs, whose first "
            f"episodes must have ended), got {steps}: use more steps or fewer envs"
        )
    return starts


@dataclass
class BaselinesStudy(ComparisonOfDepths):
    """
    DeepCRL at several depths beside SAC and TQC with hindsight goals (HER): the same env steps, envs, number of transitions
    for each update, batch size and evaluations (section 4.2 of the paper, which compares with SAC with and without HER, TD3
    with HER, GCBC and GCSL; TQC is not among them).
    """

    name: ClassVar[str] = "baselines"
    summary: ClassVar[str] = "DeepCRL beside SAC and TQC with HER"

    depths: list[int] = option([4, 16], "Depths of DeepCRL")
    baselines: list[str] = option(list(BASELINES), "What it is compared with", choices=BASELINES)
    baseline_hyperparams: dict[str, Any] = option({}, "Other arguments of SAC and TQC, e.g. tau:0.01")

    def __post_init__(self) -> None:
        super().__post_init__()
        for baseline in self.baselines:
            if baseline not in BASELINES:
                raise ValueError(f"Unknown baseline {baseline!r}. Choose from: {', '.join(BASELINES)}")
            check_hyperparams(self.baseline_hyperparams, baseline, "baseline_hyperparams")
        #: Env steps before the first update of the baselines
        self.learning_starts = self._find_learning_starts()

    def _find_learning_starts(self) -> int:
        env = make_env(self.env, 1, 0, self.env_kwargs)
        name = "_max_episode_steps"
        episode_steps = env.get_attr(name)[0] if env.has_attr(name) else None
        env.close()
        return first_update(self.n_envs, episode_steps, self.steps, self.baseline_hyperparams.get("learning_starts"))

    @property
    def all_baseline_hyperparams(self) -> dict[str, Any]:
        """
        :return: Arguments of the baselines
        """
        own = {"batch_size": self.batch_size, "learning_rate": self.learning_rate, "gamma": self.gamma, **HYPERPARAMS}
        return {**own, **self.baseline_hyperparams, "learning_starts": self.learning_starts}

    def settings(self) -> dict[str, Run]:
        settings = {f"DeepCRL, depth {depth}": self.make_run(depth=depth) for depth in self.depths}
        for baseline in self.baselines:
            settings[baseline] = replace(self.make_run(), algorithm=baseline, hyperparams=self.all_baseline_hyperparams)
        return settings

    def report(self, results: Results, runs: Path) -> Report:
        table = [{"": label, **summarize(seeds)} for label, seeds in results.items()]
        estimates = {label: final_estimate(seeds) for label, seeds in results.items()}
        notes = [
            self.protocol(),
            "Envs, env steps, transitions for each update and evaluations are the same for all; width and precision are "
            "DeepCRL's, the baselines have the networks of Stable-Baselines3, two layers of 256 units. Their arguments: "
            f"{', '.join(f'{name}={value!r}' for name, value in self.all_baseline_hyperparams.items())}. HER samples finished "
            "episodes only, so that they cannot learn before the first ones have ended.",
            *self._comparisons(estimates),
        ]
        return Report(f"DeepCRL and baselines on {self.env}", rows_of(results), table, notes, self._figure(results))

    def _comparisons(self, estimates: Mapping[str, Estimate]) -> list[str]:
        """
        :param estimates: Time at goal by setting
        :return: DeepCRL at each depth against the best baseline
        """
        best = max(self.baselines, key=lambda baseline: estimates[baseline].mean)
        return [
            f"Time at goal of DeepCRL at depth {depth} against {best}, the best of the others: "
            f"{estimates[f'DeepCRL, depth {depth}'].compare(estimates[best])}."
            for depth in self.depths
        ]

    def _figure(self, results: Results) -> Any:
        colors = depth_colors(self.depths)
        styles = {f"DeepCRL, depth {depth}": (colors[depth], "-") for depth in self.depths}
        styles.update({baseline: (f"C{1 + index}", "--") for index, baseline in enumerate(self.baselines)})
        figure = draw_learning_curves(results, styles)
        figure.suptitle(self.caption())
        return figure
