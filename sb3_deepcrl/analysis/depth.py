import csv
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from matplotlib.figure import Figure

from sb3_deepcrl.analysis.report import Results, draw_learning_curves
from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.analysis.statistics import Estimate, critical_depth
from sb3_deepcrl.analysis.study import ComparisonOfDepths

# Time at goal of the paper by env, depth and million env steps: means over its seeds, to three digits, of figure 1 in
# https://github.com/wang-kevin3290/scaling-crl, results_data/fig1_main.json of commit 86c1f08
PAPER_CURVES = Path(__file__).with_name("paper_curves.csv")

NETWORK_MEASURES = {
    "critic_loss": "critic loss",
    "actor_output": "|actor output| before tanh",
    "actor_grad_norm": "gradient norm, actor",
    "critic_grad_norm": "gradient norm, critic",
}


@dataclass(kw_only=True)
class DepthStudy(ComparisonOfDepths):
    """
    Several depths of actor and critic (figures 1 and 6).

    Time at goal and success over env steps and over seconds, for several depths of actor and critic, together or one of
    them with the other at the smallest depth.
    """

    name: ClassVar[str] = "depth"

    depths: tuple[int, ...] = (4, 8, 16, 32)
    """Depths"""
    parts: tuple[Literal["both", "actor", "critic"], ...] = ("both",)
    """What becomes deeper"""
    networks: bool = False
    """Draw the critic's loss, the size of the actor's output and the norms of the gradients, too"""

    def settings(self) -> dict[str, Run]:
        shallow = min(self.depths, default=0)
        return {
            self._label(part, depth): self.make_run_of_depths(
                shallow if part == "critic" else depth, shallow if part == "actor" else depth
            )
            for part in self.parts
            for depth in self.depths
        }

    @staticmethod
    def _label(part: str, depth: int) -> str:
        return f"depth {depth}" if part == "both" else f"{part} depth {depth}"

    def draw(self, results: Results) -> Figure:
        # Runs of older versions have none
        known = set.intersection(*(set(seed) for seeds in results.values() for seed in seeds))
        more = {name: label for name, label in NETWORK_MEASURES.items() if self.networks and name in known}
        figure = draw_learning_curves(results, is_ordered=True, more=more)
        ax = figure.axes[0]
        color_by_label = {line.get_label(): line.get_color() for line in ax.lines}
        for depth, means in self.paper_curves().items():
            thousands = 1000 * np.arange(1, len(means) + 1)
            ax.plot(thousands, means, color=color_by_label[self._label("both", depth)], linewidth=0.7, label="thin: the paper")
            ax.legend(handles=ax.lines[-1:])
        return figure

    def paper_curves(self) -> dict[int, np.ndarray]:
        """Read the paper's time at goal after each million env steps of this study, by depth; none if it has another env."""
        n = self.steps // 1_000_000
        with PAPER_CURVES.open(newline="") as file:
            found = {int(depth): np.array(means[:n], float) for env, depth, *means in csv.reader(file) if env == self.env}
        return {depth: found[depth] for depth in self.depths if "both" in self.parts and n > 0 and depth in found}

    def compare(self, estimates: dict[str, Estimate]) -> list[str]:
        last = ", ".join(f"{means[-1]:.3g} at depth {depth}" for depth, means in self.paper_curves().items())
        paper = f"Time at goal of the paper, after as many env steps in its own simulation: {last} (its commit 86c1f08)."
        return [paper] * bool(last) + [
            f"Critical depth of {part}, the smallest whose interval lies above those of all smaller ones: "
            f"{critical_depth({depth: estimates[self._label(part, depth)] for depth in self.depths}) or 'none of these'}."
            for part in self.parts
            if self.seeds > 1
        ]
