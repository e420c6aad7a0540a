from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from sb3_deepcrl.analysis.report import Results, draw_learning_curves
from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.analysis.statistics import Estimate, critical_depth
from sb3_deepcrl.analysis.study import ComparisonOfDepths

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    def settings(self) -> dict[str, Run]:
        shallow = min(self.depths)
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

    def draw(self, results: Results) -> "Figure":
        return draw_learning_curves(results, is_ordered=True)

    def compare(self, estimates: dict[str, Estimate]) -> list[str]:
        return [
            f"Critical depth of {part}, the smallest whose interval lies above those of all smaller ones: "
            f"{critical_depth({depth: estimates[self._label(part, depth)] for depth in self.depths}) or 'none of these'}."
            for part in self.parts
            if self.seeds > 1
        ]
