from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from sb3_deepcrl.analysis.report import Report, Results, evaluation_rows
from sb3_deepcrl.analysis.runs import Run
from sb3_deepcrl.analysis.statistics import interquartile_mean
from sb3_deepcrl.analysis.study import Study

AGENT, LEARNER = "agent that made the data", "offline, then online"
MEASURES = {"success_any": "success", "time_at_goal": "time at goal"}


@dataclass(kw_only=True)
class OfflineStudy(Study):
    """
    Learning from data that exist.

    An agent is trained for a part of the usual steps. Another one learns from all that this one saw, and is evaluated before
    its first step. Then it goes on in the env, for as many steps as the study has.
    """

    name: ClassVar[str] = "offline"

    steps: int = 100_000
    """Number of env steps after learning offline"""
    n_evaluations: int = 10
    """Number of evaluations of each run"""
    agent_steps: int = 200_000
    """Number of env steps that the agent is trained which makes the data"""
    offline_updates: int = 16_000
    """Number of updates on the data"""
    learner_hyperparams: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters of the agent that learns from the data, besides those of both, e.g. bc_coef:0.1"""

    def settings(self) -> dict[str, Run]:
        agent = replace(self.make_run(), steps=self.agent_steps, eval_freq=self.agent_steps)
        learner = replace(self.make_run(**self.learner_hyperparams), data_of=agent, offline_updates=self.offline_updates)
        return {AGENT: agent, LEARNER: learner}

    def needed_first(self) -> list[str]:
        return [AGENT]

    def report(self, results: Results) -> Report:
        # What was learned is taken apart: before the first step, and after the last
        parts = ((AGENT, AGENT, -1), ("offline", LEARNER, 0), (f"then {self.steps:,} steps online", LEARNER, -1))
        table: list[dict[str, Any]] = []
        for label, setting, index in parts:
            row: dict[str, Any] = {"": label}
            for name, column in MEASURES.items():
                scores = np.array([seed[name][index] for seed in results[setting]])
                row[column] = interquartile_mean(scores)
                row[f"{column}, each seed"] = ", ".join(str(interquartile_mean(score)) for score in scores[:, None])
            table.append({**row, "updates": f"{results[setting][0]['n_updates'][index]:.0f}"})
        figure = self.draw({LEARNER: results[LEARNER]})
        figure.suptitle(self.caption())
        return Report(f"Offline on {self.env}", evaluation_rows(results, {}), table, [self.protocol()], figure)

    def protocol(self) -> str:
        return (
            f"The agent was trained on {self.env}; the data are its {self.agent_steps:,} env steps. All were evaluated on "
            f"{self.eval_env}, {self.n_eval_episodes} episodes each time, with deterministic actions. Success is reaching the "
            "goal at any step, time at goal the number of "
            f"steps there. {self.averaging()}. The curve begins where learning offline has ended."
        )
