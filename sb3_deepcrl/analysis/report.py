"""
What a study found: a Markdown file, a CSV file and a picture.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_deepcrl.analysis.statistics import (
    Estimate,
    curves_of,
    final_estimate,
    final_scores,
    interquartile_mean,
    interquartile_means,
    steps_to_success,
)
from sb3_deepcrl.common.utils import atomic_path

# By setting, the evaluations of each seed: what was measured, shape (n_evaluations,) each
Results = dict[str, list[dict[str, np.ndarray]]]
# How pictures show a goal
STAR: dict[str, Any] = dict(marker="*", color="tab:red", markeredgecolor="white", linestyle="none")
# What curves show, and how their axis is named
MEASURES = {"time_at_goal": "time at goal (steps)", "success_any": "success"}
# Over what they show it, in which unit
STEPS, SECONDS = ("timesteps", 1000, "env steps (thousands)"), ("seconds", 1, "CPU seconds")


@dataclass
class Report:
    """
    What a study found: ``rows`` of the CSV file, a ``table`` and ``notes`` below it, a ``figure``, and the ``path`` of the
    Markdown file once it is written.
    """

    title: str
    rows: list[dict[str, Any]]
    table: list[dict[str, Any]]
    notes: list[str]
    figure: Figure
    path: Path | None = None

    def write(self, path: Path, command: str) -> None:
        """Write the three files, each as a whole or not at all; ``path`` is that of the Markdown file."""
        self.path = path
        with atomic_path(path.with_suffix(".csv"), ".csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            for row in self.rows:
                writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        # The layout moves the ticks, whose labels it needs to know
        self.figure.draw_without_rendering()
        with atomic_path(path.with_suffix(".png"), ".png") as temporary:
            self.figure.savefig(temporary, format="png", dpi=150)
        columns = list(self.table[0])
        lines = [f"# {self.title}", "", f"Command: `{command}`.", ""]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in self.table]
        lines += ["", *(f"{note}\n" for note in self.notes), f"![{self.title}]({path.with_suffix('.png').name})", ""]
        with atomic_path(path, ".md") as temporary:
            temporary.write_text("\n".join(lines))


def evaluation_rows(results: Results, columns: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make a row of each evaluation, with more columns by setting."""
    return [
        {
            **{"setting": label, **columns.get(label, {}), "seed": number},
            **{name: float(values[i]) for name, values in seed.items()},
        }
        for label, seeds in results.items()
        for number, seed in enumerate(seeds)
        for i in range(len(seed["timesteps"]))
    ]


def summarize(seeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Say in a row of a table how a setting did."""
    steps = np.median([steps_to_success(seed) for seed in seeds])
    return {
        "time at goal": final_estimate(seeds),
        "each seed": ", ".join(f"{score:.0f}" for score in final_scores(seeds, "time_at_goal")),
        "success": final_estimate(seeds, "success_any"),
        "best success": interquartile_mean(curves_of(seeds, "success_any").max(axis=1)),
        "steps to 90 %": f"{steps:,.0f}" if np.isfinite(steps) else "-",
        "updates": f"{seeds[0]['n_updates'][-1]:.0f}",
        "seconds": f"{np.median([seed['seconds'][-1] for seed in seeds]):.0f}",
    }


def scores_by_depth(rows: Sequence[Mapping[str, Any]], column: str) -> dict[int, np.ndarray]:
    """Average a column over the rows of each ``depth`` and ``seed``: shape ``(n_seeds,)`` by depth."""
    values: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        values.setdefault(row["depth"], {}).setdefault(row["seed"], []).append(float(row[column]))
    return {depth: np.array([np.mean(seed) for seed in seeds.values()]) for depth, seeds in values.items()}


def depth_table(scores: Mapping[str, Mapping[int, np.ndarray]]) -> list[dict[str, Any]]:
    """Make a row of each depth, with the interquartile means over the seeds of scores by column and depth."""
    depths = next(iter(scores.values()))
    return [{"depth": depth, **{name: interquartile_mean(of[depth]) for name, of in scores.items()}} for depth in depths]


def describe_origin(records_by_run: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """Say with which code, machine and arguments runs were made, each given as its algorithm and ``made_with.json``."""
    counts = Counter("; then ".join(dict.fromkeys(map(_describe, records))) for _, records in records_by_run)
    sentences = [" ".join(f"{count} of {len(records_by_run)} runs made with {what}." for what, count in counts.items())]
    # By algorithm or env, and by argument, the values that there are
    values: dict[str, dict[str, dict[str, None]]] = {}
    for algo, records in records_by_run:
        for name, value in (item for record in records for item in record["arguments"].items()):
            prefix, _, rest = name.partition(".")
            group, key = (prefix, rest) if prefix in ("env", "eval_env") else (algo, name)
            values.setdefault(group, {}).setdefault(key, {})[repr(value)] = None
    for group, named in values.items():
        words = ", ".join(f"{name}={' or '.join(found)}" for name, found in named.items())
        sentences.append(f"Arguments of {group}, defaults included: `{words}`.")
    return sentences


def _describe(record: Mapping[str, Any]) -> str:
    revision = f"revision {record['revision']}, " if record["revision"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    gpu = f", {record['gpu']}" if record["gpu"] else ""
    return (
        f"sb3_deepcrl {record['version']} ({revision}source {record['source']}), {packages}, on {record['processor']}{gpu}, "
        f"{record['cores']} cores, threads: {record['threads']}, precision {record['precision']}"
    )


# Of the lines of a picture one after the other, which tell them apart in gray too
LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))

# --- Figures ------------------------------------------------------------------------------------------------------------


def new_figure(n_rows: int = 1, n_columns: int = 1, width: float = 5.0, height: float = 3.4) -> tuple[Figure, Any]:
    """Make a figure that no window shows, and its axes, ``(n_rows, n_columns)``, each of a size in inches."""
    figure = Figure(figsize=(n_columns * width, n_rows * height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def draw_curve(ax: Axes, x: Any, curves: np.ndarray, label: str, color: Any = None, linestyle: Any = "-") -> None:
    """Draw the interquartile mean of ``curves``, ``(n_seeds, n_points)``, as a line and its interval as a band."""
    means, lows, highs = np.array(interquartile_means(curves)).T
    (line,) = ax.plot(x, means, label=label, color=color, linestyle=linestyle)
    ax.fill_between(x, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_estimates(ax: Axes, points: Mapping[float, Estimate], label: str, color: Any = None) -> None:
    """Draw estimates by their horizontal positions as points with their intervals, and lines between them."""
    means, lows, highs = np.array([points[x] for x in sorted(points)]).T
    # Of a skewed bootstrap distribution the mean may lie outside of the interval
    errors = np.maximum([means - lows, highs - means], 0)
    ax.errorbar(sorted(points), means, errors, fmt="o-", label=label, color=color, capsize=3)


def draw_learning_curves(results: Results, is_ordered: bool = False, more: Mapping[str, str] | None = None) -> Figure:
    """
    Draw time at goal and success over env steps and over seconds, in shades if the settings have an order, and ``more``
    measures with their labels over env steps, on a logarithmic scale where they explode.
    """
    shades = depth_colors(range(len(results)))
    panels = [(measure, label, *over) for measure, label in MEASURES.items() for over in (STEPS, SECONDS)]
    panels += [(measure, label, *STEPS) for measure, label in (more or {}).items()]
    figure, axes = new_figure(-(-len(panels) // 2), 2)
    for ax, (measure, ylabel, over, unit, xlabel) in zip(axes.flat, panels, strict=False):
        for number, (label, seeds) in enumerate(results.items()):
            color, style = shades[number] if is_ordered else f"C{number}", LINE_STYLES[number % len(LINE_STYLES)]
            draw_curve(ax, curves_of(seeds, over).mean(axis=0) / unit, curves_of(seeds, measure), label, color, style)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if measure in MEASURES:
            set_range(ax, measure)
        elif 0 < 30 * ax.dataLim.y0 < ax.dataLim.y1:
            ax.set_yscale("log")
    # Where it hides no line
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=4)
    return figure


def set_range(ax: Axes, measure: str) -> None:
    """Let an axis of time at goal begin at zero, and one of success show all that there can be."""
    ax.set_ylim(*((-0.02, 1.02) if measure == "success_any" else (0, None)))


def depth_colors(depths: Sequence[int]) -> dict[int, Any]:
    """Choose colors, the darker the deeper."""
    from matplotlib import colormaps

    return {depth: colormaps["viridis_r"](0.15 + 0.8 * i / max(len(depths) - 1, 1)) for i, depth in enumerate(sorted(depths))}
