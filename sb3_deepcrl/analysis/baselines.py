from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.analysis.statistics import Estimate
from sb3_deepcrl.analysis.study import ComparisonOfDepths


@dataclass(kw_only=True)
class BaselinesStudy(ComparisonOfDepths):
    """
    DeepCRL beside SAC, TQC and TD3 (section 4.2).

    DeepCRL at several depths beside SAC, TQC and TD3 with hindsight goals (HER), with the settings that zoo_configs has for
    each of them: the same env steps and evaluations, and in this package's tasks the same envs, number of transitions for each
    update and batch size (section 4.2 of the paper, which compares with SAC, SAC and TD3 with HER, GCBC and GCSL).
    HER samples finished episodes only, so that the others cannot learn before the first ones have ended.
    """

    name: ClassVar[str] = "baselines"

    depths: tuple[int, ...] = (4, 16)
    """Depths of DeepCRL"""
    baselines: tuple[Literal["sac", "tqc", "td3", "dqn"], ...] = ("sac", "tqc")
    """What it is compared with: dqn where actions are discrete"""
    baseline_hyperparams: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters of the others, where they are not to be those of the env in zoo_configs"""
    deep_baselines: bool = False
    """Give the others deep residual policies, with each of the depths"""

    def settings(self) -> dict[str, Run]:
        settings = {f"DeepCRL, depth {depth}": self.make_run(depth=depth) for depth in self.depths}
        for algo in self.baselines:
            run = replace(self.make_run(), algo=algo, hyperparams=self.baseline_hyperparams)
            for depth in self.depths if self.deep_baselines else ():
                policy_kwargs = {**self.baseline_hyperparams.get("policy_kwargs", {}), "depth": depth}
                deep = {**run.hyperparams, "policy": "DeepMultiInputPolicy", "policy_kwargs": policy_kwargs}
                settings[f"{algo.upper()}+HER, depth {depth}"] = replace(run, hyperparams=deep)
            if not self.deep_baselines:
                settings[f"{algo.upper()}+HER"] = run
        return settings

    def compare(self, estimates: dict[str, Estimate]) -> list[str]:
        best = max((label for label in estimates if "HER" in label), key=lambda label: estimates[label].mean)
        return [
            f"Time at goal of {label} against {best}, the best of the others: {estimate.compare(estimates[best])}."
            for label, estimate in estimates.items()
            if "HER" not in label
        ]
