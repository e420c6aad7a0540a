from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.analysis.statistics import curves_of
from sb3_deepcrl.analysis.study import (
    ComparisonOfDepths,
    Report,
    Results,
    add_legend,
    draw_curve,
    draw_estimates,
    final_estimate,
    new_figure,
    option,
    rows_of,
    summarize,
)

NO_RESIDUAL, NO_NORM, RELU = {"residual": False}, {"norm": "none"}, {"activation_fn": "ReLU"}
# What is changed in the network, as policy_kwargs
VARIANTS: dict[str, dict[str, Any]] = {
    "complete": {},
    "no-residual": NO_RESIDUAL,
    "no-norm": NO_NORM,
    "relu": RELU,
    "plain": {**NO_RESIDUAL, **NO_NORM, **RELU},
    "unscaled": {"residual_scale": 1},
}


@dataclass
class AblationStudy(ComparisonOfDepths):
    """
    What deep networks need (figures 5 and 16 of the paper): the complete network, the same without residual connections,
    without layer normalization, with ReLU in place of Swish, and with all three of these changes.
    """

    name: ClassVar[str] = "ablation"
    summary: ClassVar[str] = "networks without residual connections, normalization or Swish"

    depths: list[int] = option([16], "Depths")
    variants: list[str] = option(
        ["complete", "no-residual", "no-norm", "relu", "plain"],
        "Networks; plain is without all three, unscaled adds the residual branches as they are, which is the paper's way",
        choices=tuple(VARIANTS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ValueError(f"Unknown variant {variant!r}. Choose from: {', '.join(VARIANTS)}")
        # Those of "plain" too, or the network called complete would lack something
        self.check_free({name: "variants" for variant in ("plain", *self.variants) for name in VARIANTS[variant]})

    @staticmethod
    def label(variant: str, depth: int) -> str:
        """
        :param variant: One of ``VARIANTS``
        :param depth: Depth
        :return: Name of the setting
        """
        return f"{variant}, depth {depth}"

    @property
    def _cells(self) -> list[tuple[str, int]]:
        return [(variant, depth) for depth in self.depths for variant in self.variants]

    def settings(self) -> dict[str, Run]:
        return {self.label(variant, depth): self._run_of(variant, depth) for variant, depth in self._cells}

    def _run_of(self, variant: str, depth: int) -> Run:
        run = self.make_run(depth=depth)
        policy_kwargs = {**run.hyperparams.get("policy_kwargs", {}), **VARIANTS[variant]}
        return replace(run, hyperparams={**run.hyperparams, "policy_kwargs": policy_kwargs}) if policy_kwargs else run

    def report(self, results: Results, runs: Path) -> Report:
        table = [
            {"network": variant, "depth": depth, **summarize(results[self.label(variant, depth)])}
            for variant, depth in self._cells
        ]
        notes = [self.protocol(), *self._comparisons(results)]
        columns: Mapping[str, Mapping[str, Any]] = {
            self.label(variant, depth): {"network": variant, "depth": depth} for variant, depth in self._cells
        }
        return Report(f"Ablation on {self.env}", rows_of(results, columns), table, notes, self._figure(results))

    def _comparisons(self, results: Results) -> list[str]:
        """
        :param results: Evaluations of each seed by setting
        :return: Each network against the complete one of the same depth
        """
        if "complete" not in self.variants:
            return []
        notes = []
        for depth in self.depths:
            complete = final_estimate(results[self.label("complete", depth)])
            words = [
                f"{variant}: {final_estimate(results[self.label(variant, depth)]).compare(complete)}"
                for variant in self.variants
                if variant != "complete"
            ]
            if words:
                notes.append(f"Time at goal at depth {depth} against the complete network: {'; '.join(words)}.")
        return notes

    def _figure(self, results: Results) -> Any:
        figure, axes = new_figure(1, 1 + len(self.depths), width=4.4, height=3.8)
        colors = {variant: f"C{index}" for index, variant in enumerate(VARIANTS)}
        ax = axes[0, 0]
        for index, variant in enumerate(self.variants):
            shift = 0.6 * ((index + 0.5) / len(self.variants) - 0.5)
            estimates = [final_estimate(results[self.label(variant, depth)]) for depth in self.depths]
            draw_estimates(ax, [i + shift for i in range(len(self.depths))], estimates, variant, colors[variant], "o")
        ax.set_xticks(range(len(self.depths)), map(str, self.depths))
        ax.set(xlabel="depth", title="mean of the last evaluations", xlim=(-0.5, len(self.depths) - 0.5))
        for depth, ax in zip(self.depths, axes[0, 1:], strict=True):
            for variant in self.variants:
                seeds = results[self.label(variant, depth)]
                steps = curves_of(seeds, "timesteps").mean(axis=0) / 1000
                draw_curve(ax, steps, curves_of(seeds, "time_at_goal"), variant, colors[variant])
            ax.set(xlabel="env steps (thousands)", title=f"depth {depth}")
        top = max(ax.get_ylim()[1] for ax in axes[0])
        for ax in axes[0]:
            ax.set_ylim(0, top)
            ax.set_ylabel("time at goal (steps)")
        add_legend(figure, axes[0, 1])
        figure.suptitle(self.caption())
        return figure
