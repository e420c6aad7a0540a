from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.analysis.statistics import Estimate
from sb3_deepcrl.analysis.study import Report, Results, Study, final_estimate, new_figure, option, rows_of
from sb3_deepcrl.common.utils import check_depth


def grid_of(
    estimates: Mapping[tuple[int, int], Estimate], actor_depths: Sequence[int], critic_depths: Sequence[int]
) -> np.ndarray:
    """
    :param estimates: Score by depth of the actor and depth of the critic
    :param actor_depths: Depths of the actor
    :param critic_depths: Depths of the critic
    :return: Means of the scores, a row for each depth of the critic and a column for each of the actor
    """
    return np.array([[estimates[actor, critic].mean for actor in actor_depths] for critic in critic_depths])


@dataclass
class GridStudy(Study):
    """
    Time at goal of every depth of the actor with every depth of the critic, as a heat map (figure 6 of the paper).
    """

    name: ClassVar[str] = "grid"
    summary: ClassVar[str] = "every depth of the actor with every depth of the critic"

    actor_depths: list[int] = option([4, 16], "Depths of the actor")
    critic_depths: list[int] = option([4, 16], "Depths of both encoders of the critic")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_free({"depth": "actor_depths", "actor_depth": "actor_depths", "critic_depth": "critic_depths"})
        for name in ("actor_depths", "critic_depths"):
            setattr(self, name, sorted(getattr(self, name)))
            for depth in getattr(self, name):
                check_depth(depth, name)

    @staticmethod
    def label(actor: int, critic: int) -> str:
        """
        :param actor: Depth of the actor
        :param critic: Depth of the critic
        :return: Name of the setting
        """
        return f"actor {actor}, critic {critic}"

    @property
    def cells(self) -> list[tuple[int, int]]:
        """
        :return: Depths of actor and critic of each cell
        """
        return [(actor, critic) for critic in self.critic_depths for actor in self.actor_depths]

    def settings(self) -> dict[str, Run]:
        settings = {}
        for actor, critic in self.cells:
            # The same arguments as in the study of depth where it is the same setting
            deeper = {"actor_depth": actor} if actor > critic else {"critic_depth": critic} if critic > actor else {}
            settings[self.label(actor, critic)] = self.make_run(depth=min(actor, critic), **deeper)
        return settings

    def report(self, results: Results, runs: Path) -> Report:
        estimates = {cell: final_estimate(results[self.label(*cell)]) for cell in self.cells}
        table = [
            {"critic depth": critic, **{f"actor depth {actor}": estimates[actor, critic] for actor in self.actor_depths}}
            for critic in self.critic_depths
        ]
        notes = [self.protocol(), "The numbers are the time at goal.", *self._comparisons(estimates)]
        columns = {self.label(actor, critic): {"actor_depth": actor, "critic_depth": critic} for actor, critic in self.cells}
        return Report(
            f"Depth of actor and critic on {self.env}", rows_of(results, columns), table, notes, self._figure(estimates)
        )

    def _comparisons(self, estimates: Mapping[tuple[int, int], Estimate]) -> list[str]:
        """
        :param estimates: Time at goal by depth of actor and critic
        :return: What the largest depth of one of them gives, or of both, against the smallest ones
        """
        low, high = ((self.actor_depths[end], self.critic_depths[end]) for end in (0, -1))
        corners = {high: "Deeper actor and critic", (high[0], low[1]): "Deeper actor", (low[0], high[1]): "Deeper critic"}
        return [
            f"{what} ({self.label(*cell)}) against {self.label(*low)}: {estimates[cell]} against {estimates[low]}, "
            f"{estimates[cell].compare(estimates[low])}."
            for cell, what in corners.items()
            if cell != low
        ]

    def _figure(self, estimates: Mapping[tuple[int, int], Estimate]) -> Any:
        grid = grid_of(estimates, self.actor_depths, self.critic_depths)
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
        figure.suptitle(self.caption())
        return figure
