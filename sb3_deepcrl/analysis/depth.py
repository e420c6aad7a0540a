from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.analysis.statistics import critical_depth, curves_of, final_scores, interquartile_mean
from sb3_deepcrl.analysis.study import Report, Results, Study, depth_colors, draw_curve, new_figure, option, rows_of
from sb3_deepcrl.common.torch_layers import check_depth

# What becomes deeper: hyperparameters of DeepCRL
PARTS = {"both": ("depth",), "actor": ("actor_depth",), "critic": ("critic_depth",)}


@dataclass
class DepthStudy(Study):
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
        for depth in self.depths:
            check_depth(depth)

    def label(self, part: str, depth: int) -> str:
        """
        :param part: One of ``PARTS``
        :param depth: Depth of that part
        :return: Name of the setting
        """
        return f"depth {depth}" if part == "both" else f"{part} depth {depth}"

    def settings(self) -> dict[str, Run]:
        return {
            self.label(part, depth): self.make_run(**{"depth": min(self.depths), **{name: depth for name in PARTS[part]}})
            for part in self.parts
            for depth in self.depths
        }

    def report(self, results: Results, runs: Path) -> Report:
        scores = {label: final_scores(seeds, "time_at_goal") for label, seeds in results.items()}
        estimates = {label: interquartile_mean(values[:, None])[0] for label, values in scores.items()}
        table = [
            {
                "": label,
                "time at goal": estimates[label],
                "each seed": ", ".join(f"{score:.0f}" for score in scores[label]),
                "success": interquartile_mean(final_scores(seeds, "success_any")[:, None])[0],
                "best success": interquartile_mean(curves_of(seeds, "success_any").max(axis=1)[:, None])[0],
                "updates": seeds[0][-1]["updates"],
                "seconds": f"{np.median([float(rows[-1]['seconds']) for rows in seeds]):.0f}",
            }
            for label, seeds in results.items()
        ]
        notes = [
            f"Trained on {self.env} and evaluated on {self.eval_env}, {self.n_eval_episodes} episodes each time. Time at goal "
            "is the number of steps of an episode at the goal, success reaching it at any step. Interquartile means over "
            f"{self.seeds} seeds with 95 % bootstrap intervals, of the mean over the last five evaluations."
        ]
        for part in self.parts:
            by_depth = {depth: estimates[self.label(part, depth)] for depth in self.depths}
            critical = critical_depth(by_depth)
            what = "" if part == "both" else f" of the {part}"
            notes.append(
                f"Critical depth{what}, the smallest whose interval lies above those of all smaller ones: "
                f"{'none of these' if critical is None else critical}."
            )
        return Report(f"Depth on {self.env}", rows_of(results), table, notes, self._figure(results))

    def _figure(self, results: Results) -> Any:
        figure, axes = new_figure(2, 2)
        colors = depth_colors(self.depths)
        styles = dict(zip(PARTS, ("-", "--", ":"), strict=True))
        for part in self.parts:
            for depth in self.depths:
                label = self.label(part, depth)
                seeds = results[label]
                over = {
                    "env steps (thousands)": curves_of(seeds, "timesteps").mean(axis=0) / 1000,
                    "CPU seconds": curves_of(seeds, "seconds").mean(axis=0),
                }
                for row, (column, name) in enumerate((("time_at_goal", "time at goal (steps)"), ("success_any", "success"))):
                    for ax, (x_name, x) in zip(axes[row], over.items(), strict=True):
                        draw_curve(ax, x, curves_of(seeds, column), label, colors[depth], styles[part])
                        ax.set(xlabel=x_name, ylabel=name)
        for ax in axes[1]:
            ax.set_ylim(-0.02, 1.02)
        for ax in axes[0]:
            ax.set_ylim(bottom=0)
        axes[0, 0].legend()
        figure.suptitle(f"{self.eval_env.removesuffix('-v0')}, {self.seeds} seeds")
        return figure
