from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure

from sb3_deepcrl.analysis.report import Results, new_figure
from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.analysis.statistics import Estimate, final_estimate
from sb3_deepcrl.analysis.study import Study
from sb3_deepcrl.common.utils import check_depth


@dataclass(kw_only=True)
class GridStudy(Study):
    """
    Every actor depth with every critic depth (figure 6).

    Time at goal as a heat map.
    """

    name: ClassVar[str] = "grid"

    actor_depths: tuple[int, ...] = (4, 16)
    """Depths of the actor"""
    critic_depths: tuple[int, ...] = (4, 16)
    """Depths of both encoders of the critic"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("actor_depths", "critic_depths"):
            setattr(self, name, tuple(sorted(getattr(self, name))))
            for depth in getattr(self, name):
                check_depth(depth, name)

    @staticmethod
    def _label(actor: int, critic: int) -> str:
        return f"actor {actor}, critic {critic}"

    @property
    def _cells(self) -> list[tuple[int, int]]:
        return [(actor, critic) for critic in self.critic_depths for actor in self.actor_depths]

    def settings(self) -> dict[str, Run]:
        return {self._label(*cell): self.make_run_of_depths(*cell) for cell in self._cells}

    def columns(self) -> dict[str, dict[str, Any]]:
        return {self._label(*cell): dict(zip(("actor_depth", "critic_depth"), cell, strict=True)) for cell in self._cells}

    def compare(self, estimates: dict[str, Estimate]) -> list[str]:
        low, high = ((self.actor_depths[end], self.critic_depths[end]) for end in (0, -1))
        corners = {high: "Deeper actor and critic", (high[0], low[1]): "Deeper actor", (low[0], high[1]): "Deeper critic"}
        first = self._label(*low)
        return [
            f"{what} ({self._label(*cell)}) against {first}: {estimates[self._label(*cell)].compare(estimates[first])}."
            for cell, what in corners.items()
            if cell != low
        ]

    def draw(self, results: Results) -> Figure:
        means = [final_estimate(results[self._label(*cell)]).mean for cell in self._cells]
        grid = np.reshape(means, (len(self.critic_depths), len(self.actor_depths)))
        figure, axes = new_figure(width=2.2 + 0.9 * len(self.actor_depths), height=1.6 + 0.7 * len(self.critic_depths))
        ax = axes[0, 0]
        image = ax.imshow(grid, origin="lower", aspect="auto", vmin=0)
        for (row, column), value in np.ndenumerate(grid):
            # Dark text on the light half of the colors
            color = "black" if image.norm(value) > 0.6 else "white"
            ax.text(column, row, f"{value:.{0 if value >= 10 else 1}f}", ha="center", va="center", color=color)
        ax.set_xticks(range(len(self.actor_depths)), map(str, self.actor_depths))
        ax.set_yticks(range(len(self.critic_depths)), map(str, self.critic_depths))
        ax.set(xlabel="depth of the actor", ylabel="depth of the critic")
        figure.colorbar(image, label="time at goal (steps)")
        return figure
