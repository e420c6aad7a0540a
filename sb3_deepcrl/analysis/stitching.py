"""
Ways longer than any that was trained.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from stable_baselines3.common.type_aliases import PolicyPredictor

from sb3_deepcrl.analysis.episodes import EVAL_SEED, make_env, make_envs
from sb3_deepcrl.analysis.report import (
    MEASURES,
    Report,
    Results,
    depth_colors,
    draw_curve,
    new_figure,
    scores_by_depth,
    set_range,
)
from sb3_deepcrl.analysis.statistics import interquartile_mean
from sb3_deepcrl.analysis.study import ComparisonOfDepths
from sb3_deepcrl.common.evaluation import evaluate_goals, mean_of_episodes
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.envs import BatchVecEnv
from sb3_deepcrl.envs.goal_env import GoalEnv
from sb3_deepcrl.envs.layouts import Layout
from sb3_deepcrl.envs.scenes import Maze

CURVES = ("success_any", "time_at_goal")


def _cells_by_distance(layout: Layout) -> dict[int, np.ndarray]:
    """Row and column of all cells of a maze with one start, ``(n, 2)``, by their distance from it in cells, from 1 on."""
    if len(layout.starts) != 1:
        raise ValueError(f"Distances are measured from one start, but maze {layout.name!r} has {len(layout.starts)}: keep one")
    distances = layout.distances(layout.starts[0])
    return {distance: np.argwhere(distances == distance) for distance in range(1, int(distances.max()) + 1)}


def evaluate_distance(
    model: PolicyPredictor,
    env_id: str,
    distance: int,
    n_eval_episodes: int = 64,
    env_kwargs: Mapping[str, Any] | None = None,
    seed: int = EVAL_SEED,
) -> dict[str, float]:
    """
    Evaluate on ways of one length in cells, from the start to the cells at that distance, each equally often: mean of each
    measure of :class:`~sb3_deepcrl.common.evaluation.GoalEpisode` by name.
    """
    # One episode for each env, as start and goal are set for one episode
    env = make_envs(env_id, n_eval_episodes, env_kwargs, seed)
    assert isinstance(env, BatchVecEnv)
    scene = env.task.scene
    assert isinstance(scene, Maze)
    cells = _cells_by_distance(scene.layout)[distance]
    # What a goal has besides x and y is the same for all of them
    _, goals = scene.draw(np.zeros((1, scene.n_uniform)))
    start = scene.layout.starts[0] * scene.cell_size
    places = [np.concatenate([cells[i % len(cells)] * scene.cell_size, goals[0, 2:]]) for i in range(n_eval_episodes)]
    env.set_options([{"start": start, "goal": place} for place in places])
    means = mean_of_episodes(evaluate_goals(model, env, n_eval_episodes))
    env.close()
    return means


@dataclass(kw_only=True)
class StitchingStudy(ComparisonOfDepths):
    """
    Ways that are longer than all trained ones (figure 11).

    Success and time at goal by the distance between start and goal, beyond the distances that were trained, for models of
    several depths.
    """

    name: ClassVar[str] = "stitching"
    looks_into_models: ClassVar[bool] = True

    env: str = "PointUMazeStitch-v0"
    """Env that is trained on, with starts and goals a few cells apart"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _, trained = self._read_maze(self.env)
        if trained is None:
            raise ValueError(
                f"{self.env} is trained on ways of all lengths: use PointUMazeStitch-v0, for instance, or limit them to k "
                "cells with `stitching:k` in `env_kwargs`"
            )
        self._trained = trained
        self._distances = list(_cells_by_distance(self._read_maze(self.eval_env)[0]))

    def _read_maze(self, env_id: str) -> tuple[Layout, int | None]:
        """The layout of a maze, and the largest distance between start and goal in cells, None without a limit."""
        with make_env(env_id, self.env_kwargs if env_id == self.env else self.all_eval_env_kwargs) as made:
            env = made.unwrapped
        if not isinstance(env, GoalEnv) or not isinstance(env.task.scene, Maze):
            raise ValueError(f"The study needs a maze of this package, got {env_id!r}: use PointUMazeStitch-v0, for instance")
        return env.task.scene.layout, env.task_kwargs.get("stitching")

    def report(self, results: Results) -> Report:
        def measure(depth: int, seed: int, model: DeepCRL) -> Iterator[dict[str, Any]]:
            for distance in self._distances:
                means = evaluate_distance(model, self.eval_env, distance, self.n_eval_episodes, self.all_eval_env_kwargs)
                yield {"trained": distance <= self._trained, "distance": distance, **means}

        rows = self.measure_models(measure)
        # By measure and depth, shape (n_seeds, n_distances)
        shape = (len(self.depths), self.seeds, len(self._distances))
        curves = {name: dict(zip(self.depths, np.reshape([row[name] for row in rows], shape), strict=True)) for name in CURVES}
        table = [
            {
                "depth": depth,
                "distance (cells)": distance,
                "trained": "yes" if distance <= self._trained else "no",
                "success": interquartile_mean(curves["success_any"][depth][:, i]),
                "time at goal": interquartile_mean(curves["time_at_goal"][depth][:, i]),
                "success of each seed": ", ".join(f"{score:.2f}" for score in curves["success_any"][depth][:, i]),
            }
            for depth in self.depths
            for i, distance in enumerate(self._distances)
        ]
        notes = [
            f"Trained on {self.env}, where start and goal are at most {self._trained} cells apart. Then evaluated on the ways "
            f"from the start of {self.eval_env} to the cells at each distance, {self.n_eval_episodes} episodes for each. "
            f"Success is reaching the goal at any step, time at goal the number of steps there. {self.averaging()}."
        ]
        for name, trained in (("trained", True), ("longer", False)):
            part = [row for row in rows if row["trained"] == trained]
            found = [f"{np.mean(seeds):.2f} at depth {d}" for d, seeds in scores_by_depth(part, "success_any").items()]
            notes.append(f"Mean success on {name} ways: {', '.join(found)}.")
        return Report(f"Stitching on {self.env}", rows, table, notes, self._figure(curves))

    def _figure(self, curves: dict[str, dict[int, np.ndarray]]) -> Figure:
        figure, axes = new_figure(1, 2)
        colors = depth_colors(self.depths)
        for ax, name in zip(axes[0], CURVES, strict=True):
            ax.axvspan(0.5, self._trained + 0.5, color="0.9", label="trained")
            for depth, scores in curves[name].items():
                draw_curve(ax, self._distances, scores, f"depth {depth}", colors[depth])
            xlim = (0.5, max(self._distances) + 0.5)
            ax.set(xlabel="cells from start to goal", ylabel=MEASURES[name], xlim=xlim, xticks=self._distances)
            set_range(ax, name)
        axes[0, 1].legend()
        figure.suptitle(self.caption())
        return figure
