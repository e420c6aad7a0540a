"""
Ways longer than any that was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from stable_baselines3.common.type_aliases import PolicyPredictor

from sb3_deepcrl.analysis.runs import EVAL_SEED, Run, load_model, make_env, make_single_env, read_rows, results_of, write_rows
from sb3_deepcrl.analysis.statistics import interquartile_mean
from sb3_deepcrl.analysis.study import (
    ComparisonOfDepths,
    Report,
    Results,
    depth_colors,
    draw_curve,
    new_figure,
    option,
    scores_by_depth,
)
from sb3_deepcrl.common.evaluation import evaluate_goals, mean_of_episodes
from sb3_deepcrl.envs import BatchVecEnv
from sb3_deepcrl.envs.goal_env import GoalEnv
from sb3_deepcrl.envs.layouts import Layout
from sb3_deepcrl.envs.scenes import Maze

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = {"success_any": "success", "time_at_goal": "time at goal (steps)"}
MEASURES = ("success_any", "success_last", "time_at_goal", "mean_distance")


def cells_by_distance(layout: Layout) -> dict[int, np.ndarray]:
    """
    :param layout: A maze with one start
    :return: Row and column of all cells, shape ``(n, 2)``, by their distance from the start in cells, from 1 on
    :raises ValueError: if there are several starts
    """
    if len(layout.starts) != 1:
        raise ValueError(f"Distances are measured from one start, but maze {layout.name!r} has {len(layout.starts)}: keep one")
    distances = layout.distances(layout.starts[0])
    return {distance: np.argwhere(distances == distance) for distance in range(1, int(distances.max()) + 1)}


def maze_of(env_id: str, env_kwargs: Mapping[str, Any]) -> tuple[Maze, int | None]:
    """
    :param env_id: Id of an env
    :param env_kwargs: Its arguments
    :return: Its maze, and the largest distance between start and goal in training in cells, None without a limit
    :raises ValueError: if it is no maze of this package
    """
    made = make_single_env(env_id, env_kwargs)
    made.close()
    env = made.unwrapped
    if not isinstance(env, GoalEnv) or not isinstance(env.task.scene, Maze):
        raise ValueError(f"The study needs a maze of this package, got {env_id!r}: use PointUMazeStitch-v0, for instance")
    return env.task.scene, env.task_kwargs.get("stitching")


def evaluate_distance(
    model: PolicyPredictor,
    env_id: str,
    distance: int,
    n_eval_episodes: int = 64,
    env_kwargs: Mapping[str, Any] | None = None,
    seed: int = EVAL_SEED,
) -> dict[str, float]:
    """
    Evaluate on ways of one length, from the start to the cells at that distance, each equally often.

    :param model: Anything that has ``predict``
    :param env_id: Id of a maze of this package
    :param distance: Distance from the start in cells
    :param n_eval_episodes: Number of episodes
    :param env_kwargs: Arguments of the env
    :param seed: Seed of the first env
    :return: Mean of each measure of :class:`~sb3_deepcrl.common.evaluation.GoalEpisode` over the episodes, by name
    :raises ValueError: if there is no cell at that distance
    """
    # One episode for each env, as start and goal are set for one episode
    env = make_env(env_id, n_eval_episodes, seed, env_kwargs)
    assert isinstance(env, BatchVecEnv)
    scene = env.task.scene
    assert isinstance(scene, Maze)
    cells = cells_by_distance(scene.layout)
    if distance not in cells:
        raise ValueError(f"No cell of {env_id} is {distance} cells from the start: choose 1 to {max(cells)}")
    # What a goal has besides x and y is the same for all of them
    _, goals = scene.draw(np.zeros((1, scene.n_uniform)))
    start = scene.layout.starts[0] * scene.cell_size
    env.set_options(
        [
            {
                "start": start,
                "goal": np.concatenate([cells[distance][i % len(cells[distance])] * scene.cell_size, goals[0, 2:]]),
            }
            for i in range(n_eval_episodes)
        ]
    )
    means = mean_of_episodes(evaluate_goals(model, env, n_eval_episodes))
    env.close()
    return means


@dataclass
class StitchingStudy(ComparisonOfDepths):
    """
    Success and time at goal by the distance between start and goal, beyond the distances that were trained, for models of
    several depths (figure 11 of the paper).
    """

    name: ClassVar[str] = "stitching"
    summary: ClassVar[str] = "ways longer than the trained ones"

    env: str = option("PointUMazeStitch-v0", "Env that is trained on, with starts and goals a few cells apart")

    def __post_init__(self) -> None:
        super().__post_init__()
        _, self._trained = maze_of(self.env, self.env_kwargs)
        if self._trained is None:
            raise ValueError(
                f"{self.env} is trained on ways of all lengths: use PointUMazeStitch-v0, for instance, or limit them to k "
                "cells with `stitching:k` in `env_kwargs`"
            )
        self._distances = list(cells_by_distance(maze_of(self.eval_env, self.env_kwargs)[0].layout))

    def is_complete(self, run: Run, runs: Path) -> bool:
        return super().is_complete(run, runs) and len(self.distance_rows(run, runs)) == len(self._distances)

    def distance_rows(self, run: Run, runs: Path) -> list[dict[str, str]]:
        """
        :param run: A run
        :param runs: Folder of all runs
        :return: Evaluations of its present model so far, one for each distance
        """
        folder = run.folder(runs)
        if not (folder / "stitching.csv").exists():
            return []
        last = results_of(run, runs)[-1]["timesteps"]
        return [row for row in read_rows([folder / "stitching.csv"]) if row["timesteps"] == last]

    def train_run(self, run: Run, runs: Path, n_threads: int | None = None, reuse_other_code: bool = False) -> None:
        super().train_run(run, runs, n_threads, reuse_other_code)
        rows: list[dict[str, Any]] = list(self.distance_rows(run, runs))
        model = load_model(run, runs)
        for distance in self._distances[len(rows) :]:
            means = evaluate_distance(model, run.eval_env, distance, run.n_eval_episodes, run.eval_kwargs)
            rows.append(
                {
                    "timesteps": model.num_timesteps,
                    "distance": distance,
                    "episodes": run.n_eval_episodes,
                    **{name: round(means[name], 4) for name in MEASURES},
                }
            )
            write_rows(run.folder(runs) / "stitching.csv", rows)

    def report(self, results: Results, runs: Path) -> Report:
        assert self._trained is not None
        rows: list[dict[str, Any]] = [
            {"depth": depth, "seed": run.seed, "trained": int(row["distance"]) <= self._trained, **row}
            for depth in self.depths
            for run in self.seeds_of(self.make_run(depth=depth))
            for row in self.distance_rows(run, runs)
        ]
        # By depth and measure, shape (n_seeds, n_distances)
        curves = {
            (depth, name): np.stack(
                [
                    scores_by_depth([row for row in rows if int(row["distance"]) == distance], name)[depth]
                    for distance in self._distances
                ],
                axis=1,
            )
            for depth in self.depths
            for name in CURVES
        }
        table = []
        for depth in self.depths:
            estimates = [interquartile_mean(curves[depth, name]) for name in CURVES]
            for i, distance in enumerate(self._distances):
                table.append(
                    {
                        "depth": depth,
                        "distance (cells)": distance,
                        "trained": "yes" if distance <= self._trained else "no",
                        "success": estimates[0][i],
                        "each seed": ", ".join(f"{score:.2f}" for score in curves[depth, "success_any"][:, i]),
                        "time at goal": estimates[1][i],
                    }
                )
        notes = [
            f"Trained on {self.env}, where start and goal are at most {self._trained} cells apart. Then evaluated on the ways "
            f"from the start of {self.eval_env} to the cells at each distance, {self.n_eval_episodes} episodes for each. "
            "Success is reaching the goal at any step, time at goal the number of steps there. "
            f"{self.averaging()}."
        ]
        for name, trained in (("trained", True), ("longer", False)):
            part = [row for row in rows if row["trained"] == trained]
            if part:
                means = {depth: np.mean(seeds) for depth, seeds in scores_by_depth(part, "success_any").items()}
                found = ", ".join(f"{mean:.2f} at depth {depth}" for depth, mean in means.items())
                notes.append(f"Mean success on {name} ways: {found}.")
        return Report(f"Stitching on {self.env}", rows, table, notes, self._figure(curves))

    def _figure(self, curves: dict[tuple[int, str], np.ndarray]) -> "Figure":
        assert self._trained is not None
        figure, axes = new_figure(1, 2)
        colors = depth_colors(self.depths)
        for ax, (column, name) in zip(axes[0], CURVES.items(), strict=True):
            ax.axvspan(0.5, self._trained + 0.5, color="0.9", label="trained")
            for depth in self.depths:
                draw_curve(ax, self._distances, curves[depth, column], f"depth {depth}", colors[depth])
            ax.set(xlabel="cells from start to goal", ylabel=name, xlim=(0.5, max(self._distances) + 0.5))
            ax.set_xticks(self._distances)
        axes[0, 0].set_ylim(-0.02, 1.02)
        axes[0, 1].set_ylim(bottom=0)
        axes[0, 1].legend()
        figure.suptitle(self.caption())
        return figure
