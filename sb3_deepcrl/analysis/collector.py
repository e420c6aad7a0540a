from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from sb3_deepcrl.analysis.runs import COLLECTOR, Run
from sb3_deepcrl.analysis.statistics import N_LAST, Estimate, curves_of, final_scores, interquartile_mean
from sb3_deepcrl.analysis.study import Report, Results, Study, depth_colors, draw_curve, new_figure, option, rows_of
from sb3_deepcrl.common.utils import check_depth


def rows_of_learner(seeds: Sequence[Sequence[Mapping[str, str]]], learner: str) -> list[list[Mapping[str, str]]]:
    """
    :param seeds: Evaluations of each seed
    :param learner: Name of a learner, or ``COLLECTOR``
    :return: Those of that one
    """
    return [[row for row in rows if row["learner"] == learner] for rows in seeds]


def conclusions(scores: Mapping[tuple[int, int], Estimate], deep: int, shallow: int) -> list[str]:
    """
    What explains the gain of depth: the data that a deep collector brings, or what a deep learner makes of data.

    :param scores: Score by depth of the collector and depth of the learner
    :param deep: The larger depth
    :param shallow: The smaller one
    :return: A sentence for each
    """
    sentences = []
    for title, better, worse in [
        (f"From the data of collector {deep}, learner {deep} against {shallow}", (deep, deep), (deep, shallow)),
        (f"From the data of collector {shallow}, learner {deep} against {shallow}", (shallow, deep), (shallow, shallow)),
        (f"Learner {deep}, from the data of collector {deep} against {shallow}", (deep, deep), (shallow, deep)),
        (f"Learner {shallow}, from the data of collector {deep} against {shallow}", (deep, shallow), (shallow, shallow)),
    ]:
        first, second = scores[better], scores[worse]
        sentences.append(f"{title}: {first} against {second}, {first.compare(second)}.")
    return sentences


@dataclass
class CollectorStudy(Study):
    """
    Does depth pay because a deep policy collects better data, or because a deep network learns more from data? A deep and then
    a shallow model, the collector, acts and fills the only replay buffer. A deep and a shallow learner train from it at the
    same time, with as many updates, and never act (figure 8 of the paper).
    """

    name: ClassVar[str] = "collector"
    summary: ClassVar[str] = "deep and shallow learners from the data of a deep or shallow collector"

    deep: int = option(32, "Depth of the deep collector and learner")
    shallow: int = option(4, "Depth of the shallow collector and learner")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth(self.deep)
        check_depth(self.shallow)
        if self.deep <= self.shallow:
            raise ValueError(f"`deep` must be larger than `shallow`, got {self.deep} and {self.shallow}")
        self.check_free(dict.fromkeys(("depth", "actor_depth", "critic_depth"), "deep"))

    def settings(self) -> dict[str, Run]:
        learners = {self._name(depth): {"depth": depth} for depth in (self.deep, self.shallow)}
        return {
            f"collector depth {depth}": replace(self.make_run(depth=depth), learners=learners)
            for depth in (self.deep, self.shallow)
        }

    @staticmethod
    def _name(depth: int) -> str:
        return f"depth-{depth}"

    def report(self, results: Results, runs: Path) -> Report:
        depths = (self.deep, self.shallow)
        table: list[dict[str, Any]] = []
        scores = {}
        for collector in depths:
            seeds = results[f"collector depth {collector}"]
            for name, learner in [("collector itself", COLLECTOR), *((f"depth {d}", self._name(d)) for d in depths)]:
                of_learner = rows_of_learner(seeds, learner)
                final = final_scores(of_learner, "time_at_goal")
                table.append(
                    {
                        "collector": f"depth {collector}",
                        "learner": name,
                        "time at goal": interquartile_mean(final[:, None])[0],
                        "each seed": ", ".join(f"{score:.0f}" for score in final),
                        "success": interquartile_mean(final_scores(of_learner, "success_any")[:, None])[0],
                        "updates": of_learner[0][-1]["updates"],
                    }
                )
            for learner_depth in depths:
                of_learner = rows_of_learner(seeds, self._name(learner_depth))
                scores[collector, learner_depth] = interquartile_mean(final_scores(of_learner, "time_at_goal")[:, None])[0]
        notes = [
            f"Trained on {self.env} and evaluated on {self.eval_env}, {self.n_eval_episodes} episodes each time. Only the "
            "collector acts in training; the learners train from its replay buffer, each on minibatches of its own. "
            f"{self.averaging()}, of the mean over the last {min(N_LAST, self.n_evaluations)} evaluations. "
            "A difference is clear where the intervals of time at goal do not meet.",
            *conclusions(scores, self.deep, self.shallow),
        ]
        return Report(f"Collector and learner on {self.env}", rows_of(results), table, notes, self._figure(results))

    def _figure(self, results: Results) -> Any:
        depths = (self.deep, self.shallow)
        figure, axes = new_figure(1, 2)
        colors = depth_colors(depths)
        for ax, collector in zip(axes[0], depths, strict=True):
            for label, learner, color, style in [
                *((f"learner, depth {d}", self._name(d), colors[d], "-") for d in depths),
                ("the collector itself", COLLECTOR, "0.5", ":"),
            ]:
                seeds = rows_of_learner(results[f"collector depth {collector}"], learner)
                steps = curves_of(seeds, "timesteps").mean(axis=0) / 1000
                draw_curve(ax, steps, curves_of(seeds, "time_at_goal"), label, color, style)
            kind = "Deep" if collector == self.deep else "Shallow"
            ax.set(
                title=f"{kind} collector (depth {collector})", xlabel="env steps (thousands)", ylabel="time at goal (steps)"
            )
        top = max(ax.get_ylim()[1] for ax in axes[0])
        for ax in axes[0]:
            ax.set_ylim(0, top)
        axes[0, 0].legend()
        figure.suptitle(self.caption())
        return figure
