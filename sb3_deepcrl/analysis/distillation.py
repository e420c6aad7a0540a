"""
Does a shallow policy do what a deep one has learned, if it is taught by it or cut out of it?
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sb3_deepcrl.analysis.runs import RUNS, SEED, Run, config_entry
from sb3_deepcrl.analysis.statistics import Estimate
from sb3_deepcrl.analysis.study import Study
from sb3_deepcrl.common.utils import check_depth
from sb3_deepcrl.deploy import Distillation


@dataclass(kw_only=True)
class DistillationStudy(Study):
    """
    Can a shallow policy do what a deep one learned?

    A student of a small depth that learns from a deep teacher, and the teacher without most of its residual blocks, beside the
    teacher and a model of the small depth that learned by itself. Students make their env steps after those of their teacher.
    """

    name: ClassVar[str] = "distillation"

    env: str = "PointBigMaze-v0"
    teacher_depth: int = 64
    """Depth of the teacher"""
    depths: tuple[int, ...] = (4,)
    """Depths of the students"""
    pruned_depths: tuple[int, ...] = (16, 8)
    """Depths that are left of the teacher"""
    student_steps: int = 250_000
    """Number of env steps of students and pruned teachers"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for depth in (self.teacher_depth, *self.depths, *self.pruned_depths):
            check_depth(depth)
        if max((*self.depths, *self.pruned_depths), default=0) >= self.teacher_depth:
            raise ValueError(f"`teacher_depth` must be larger than all other depths, got {self.teacher_depth}")

    @property
    def _teacher_label(self) -> str:
        return f"teacher, depth {self.teacher_depth}"

    @property
    def _teacher(self) -> Run:
        return self.make_run(depth=self.teacher_depth)

    def _taught(self, depth: int, prune: bool) -> Run:
        name = self.env.rpartition(":")[2]
        teacher = f"{RUNS}/{self._teacher.folder(self.runs).parent.name}/seed-{SEED}/deepcrl/{name}_1"
        arguments: dict[str, Any] = {
            "teacher": f"{teacher}/{name}.zip",
            "replay_buffer": f"{teacher}/replay_buffer.pkl",
            "prune": prune,
        }
        of_env = {**config_entry("deepcrl", name), **self.hyperparams}
        if of_env.get("normalize"):
            arguments["vec_normalize"] = f"{teacher}/{name}/vecnormalize.pkl"
        callback = [{f"{Distillation.__module__}.{Distillation.__name__}": arguments}]
        run = self.make_run(depth=depth, callback=callback)
        # As many updates as the others have
        transitions = max(of_env.get("transitions_per_update", 16) * self.student_steps // self.steps, 1)
        hyperparams = {**run.hyperparams, "transitions_per_update": transitions}
        eval_freq = self.student_steps // self.n_evaluations
        return replace(run, steps=self.student_steps, eval_freq=eval_freq, hyperparams=hyperparams)

    def settings(self) -> dict[str, Run]:
        return {
            self._teacher_label: self._teacher,
            **{f"by itself, depth {depth}": self.make_run(depth=depth) for depth in self.depths},
            **{f"student, depth {depth}": self._taught(depth, prune=False) for depth in self.depths},
            **{f"pruned to depth {depth}": self._taught(depth, prune=True) for depth in self.pruned_depths},
        }

    def protocol(self) -> str:
        return (
            "Students and pruned teachers learn from the teacher of their seed, on states of its replay buffer and their own: "
            f"{self.student_steps:,} env steps with as many updates as the others have. {super().protocol()}"
        )

    def columns(self) -> dict[str, dict[str, Any]]:
        return {label: {"env steps": f"{run.steps:,}"} for label, run in self.settings().items()}

    def needed_first(self) -> list[str]:
        return [self._teacher_label]

    def compare(self, estimates: dict[str, Estimate]) -> list[str]:
        taught = [label for label in estimates if label.startswith(("student", "pruned"))]
        others = [label for label in estimates if label not in taught]
        return [
            f"{label} against {other}: {estimates[label].compare(estimates[other])}." for label in taught for other in others
        ]
