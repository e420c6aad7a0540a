from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.analysis.statistics import critical_depth
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
from sb3_deepcrl.common.utils import check_choice

# What becomes deeper, and its argument of DeepCRL
PARTS = {"both": "depth", "actor": "actor_depth", "critic": "critic_depth"}


@dataclass
class DepthStudy(ComparisonOfDepths):
    """
    Time at goal and success over env steps and over seconds, for several depths of actor and critic, together or one of
    them with the other at the smallest depth (figures 1 and 6 of the paper).
    """

    name: ClassVar[str] = "depth"
    summary: ClassVar[str] = "time at goal and success for several depths"

    depths: list[int] = option([4, 8, 16, 32], "Depths")
    parts: list[str] = option(["both"], "What becomes deeper", choices=tuple(PARTS))

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts:
            check_choice(part, tuple(PARTS), "parts")

    def label(self, part: str, depth: int) -> str:
        """
        :param part: One of ``PARTS``
        :param depth: Depth of that part
        :return: Name of the setting
        """
        return f"depth {depth}" if part == "both" else f"{part} depth {depth}"

    def settings(self) -> dict[str, Run]:
        return {
            # The smallest depth of one part is that of both, and the same run
            self.label(part, depth): self.make_run(
                **{"depth": min(self.depths), **({PARTS[part]: depth} if depth > min(self.depths) else {})}
            )
            for part in self.parts
            for depth in self.depths
        }

    def report(self, results: Results, runs: Path) -> Report:
        table = [{"": label, **summarize(seeds)} for label, seeds in results.items()]
        notes = [self.protocol()]
        for part in self.parts:
            if self.seeds == 1:
                continue
            by_depth = {depth: final_estimate(results[self.label(part, depth)]) for depth in self.depths}
            critical = critical_depth(by_depth)
            what = "" if part == "both" else f" of the {part}"
            notes.append(
                f"Critical depth{what}, the smallest whose interval lies above those of all smaller ones: "
                f"{'none of these' if critical is None else critical}."
            )
        return Report(f"Depth on {self.env}", rows_of(results), table, notes, self._figure(results))

    def _figure(self, results: Results) -> Any:
        colors = depth_colors(self.depths)
        linestyles = dict(zip(PARTS, ("-", "--", ":"), strict=True))
        styles = {self.label(part, depth): (colors[depth], linestyles[part]) for part in self.parts for depth in self.depths}
        figure = draw_learning_curves(results, styles)
        figure.suptitle(self.caption())
        return figure
