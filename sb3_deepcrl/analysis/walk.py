from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import VecEnv

from sb3_deepcrl.analysis.runs import EVAL_SEED, make_env, make_single_env
from sb3_deepcrl.analysis.statistics import interquartile_mean
from sb3_deepcrl.analysis.study import ComparisonOfDepths, Report, Results, depth_colors, new_figure, option
from sb3_deepcrl.analysis.value_map import MazeMap
from sb3_deepcrl.envs.registration import ENV_TABLE

# What may happen in an episode, from good to bad
CLASSES = ("walks", "goes over the wall", "stands", "falls at the goal", "falls on the way")
# Who goes over a wall has the torso that far inside of its outline, as a share of the side of a cell: 0.5 m for the humanoid.
# Leaning against it is less.
OVER_WALL = 0.25
# Who stayed at the goal that long, in seconds, has walked there, even with a fall later on
STAY_SECONDS = 1.5
# A fall is one at the goal up to that horizontal distance from it (the released code's easy threshold), in metres, ...
AT_GOAL = 2.0
# ... if it covered that share of the distance at the start: otherwise the humanoid just fell where it was
APPROACH = 0.5
# Who never was that far from the start, in metres, has not walked
STANDING_RADIUS = 0.5
# Steps of the path, in seconds: shorter ones would count how the torso sways
PATH_SECONDS = 0.3


@dataclass
class Trajectory:
    """
    What was recorded of an episode.

    :param positions: x, y and z of the torso in metres at the start and after each step, shape ``(n_steps + 1, 3)``
    :param goals: The goal at the same times, same shape
    :param healthy: Whether the height of the torso was in the healthy range after each step, shape ``(n_steps,)``
    :param successes: Whether the goal was reached after each step, shape ``(n_steps,)``
    :param dt: Seconds of a step
    """

    positions: np.ndarray
    goals: np.ndarray
    healthy: np.ndarray
    successes: np.ndarray
    dt: float

    @property
    def fall_step(self) -> int | None:
        """Step after which the torso was out of the healthy range, from 1 on; None if it never was."""
        return None if self.healthy.all() else int(np.argmin(self.healthy)) + 1

    @property
    def upright(self) -> slice:
        """The part of the positions and goals up to the fall."""
        return slice(0, None if self.fall_step is None else self.fall_step + 1)


@dataclass
class WalkEpisode:
    """
    How the humanoid moved in an episode, up to its fall if there was one.

    :param kind: One of ``CLASSES``
    :param steps: Number of steps
    :param fall_step: Step of the fall, None without one
    :param mean_height: Mean height of the torso in metres
    :param min_height: Lowest height of the torso in metres
    :param distance_travelled: Length of its horizontal path in metres
    :param start_distance: Distance to the goal at the start in metres
    :param closest_distance: Smallest distance to the goal in metres
    :param final_distance: Distance to the goal at the end in metres
    :param reached: Whether the goal was reached
    :param time_at_goal: Number of steps at the goal
    """

    kind: str
    steps: int
    fall_step: int | None
    mean_height: float
    min_height: float
    distance_travelled: float
    start_distance: float
    closest_distance: float
    final_distance: float
    reached: bool
    time_at_goal: int


def goes_over_wall(positions: np.ndarray, maze: MazeMap) -> np.ndarray:
    """
    :param positions: Positions in metres, shape ``(n, 2)`` or more coordinates
    :param maze: The maze
    :return: Whether each is above a wall, and at least ``OVER_WALL`` of a cell away from where there is none, along both axes
    """
    margin = OVER_WALL * maze.cell_size
    shifts = margin * np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    return np.all(maze.is_wall(positions[:, None, :2] + shifts), axis=1)


def longest_stay(at_goal: np.ndarray) -> int:
    """
    :param at_goal: Whether the goal was reached at each step
    :return: Largest number of such steps in a row
    """
    longest = run = 0
    for reached in at_goal:
        run = run + 1 if reached else 0
        longest = max(longest, run)
    return longest


def classify(trajectory: Trajectory, maze: MazeMap | None = None) -> str:
    """
    The first of these that holds:

    - goes over the wall: the torso was above a wall, ``OVER_WALL`` of a cell inside of it, whatever came later
    - walks: stayed at the goal for ``STAY_SECONDS`` without a break and upright; or never fell and moved further from the
      start than ``STANDING_RADIUS``, or was at the goal
    - stands: never fell otherwise
    - falls at the goal: fell at most ``AT_GOAL`` metres from it, and covered ``APPROACH`` of its distance at the start
    - falls on the way: fell otherwise

    :param trajectory: What was recorded
    :param maze: The maze, if there is one
    :return: One of ``CLASSES``
    """
    positions, goals = (array[trajectory.upright, :2] for array in (trajectory.positions, trajectory.goals))
    at_goal = trajectory.successes[: len(positions) - 1]
    if maze is not None and goes_over_wall(positions, maze).any():
        return "goes over the wall"
    if longest_stay(at_goal) * trajectory.dt >= STAY_SECONDS:
        return "walks"
    if trajectory.fall_step is None:
        moved = np.linalg.norm(positions - positions[0], axis=1).max()
        return "walks" if moved > STANDING_RADIUS or at_goal.any() else "stands"
    distances = np.linalg.norm(positions - goals, axis=1)
    thrown = distances[-1] <= AT_GOAL and distances[0] - distances[-1] >= APPROACH * distances[0]
    return "falls at the goal" if thrown else "falls on the way"


def walk_episode(trajectory: Trajectory, maze: MazeMap | None = None) -> WalkEpisode:
    """
    :param trajectory: What was recorded
    :param maze: The maze, if there is one
    :return: What it shows
    """
    positions, goals = trajectory.positions[trajectory.upright], trajectory.goals[trajectory.upright]
    at_goal = trajectory.successes[: len(positions) - 1]
    distances = np.linalg.norm(positions - goals, axis=1)
    stride = max(round(PATH_SECONDS / trajectory.dt), 1)
    path = np.concatenate([positions[:-1:stride, :2], positions[-1:, :2]])
    return WalkEpisode(
        kind=classify(trajectory, maze),
        steps=len(trajectory.healthy),
        fall_step=trajectory.fall_step,
        mean_height=float(positions[:, 2].mean()),
        min_height=float(positions[:, 2].min()),
        distance_travelled=float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum()),
        start_distance=float(distances[0]),
        closest_distance=float(distances.min()),
        final_distance=float(distances[-1]),
        reached=bool(at_goal.any()),
        time_at_goal=int(at_goal.sum()),
    )


class TrajectoryRecorder:
    """
    Callback for :func:`~stable_baselines3.common.evaluation.evaluate_policy` that records one :class:`Trajectory` for each
    episode.

    :param env: The environment that is evaluated
    """

    def __init__(self, env: VecEnv):
        self.trajectories: list[Trajectory] = []
        self._dt = float(env.get_attr("task")[0].dt)
        self._steps: list[list[tuple[Any, ...]]] = [[] for _ in range(env.num_envs)]

    def __call__(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """
        :param locals_: Local variables of ``evaluate_policy``
        :param globals_: Its global variables
        """
        index, info = locals_["i"], locals_["info"]
        before = locals_["observations"]
        step = (before["achieved_goal"][index], before["desired_goal"][index], info["is_healthy"], info["is_success"])
        self._steps[index].append(step)
        if locals_["done"]:
            positions, goals, healthy, successes = zip(*self._steps[index], strict=True)
            last = info["terminal_observation"]
            self.trajectories.append(
                Trajectory(
                    np.array([*positions, last["achieved_goal"]], dtype=np.float64),
                    np.array([*goals, last["desired_goal"]], dtype=np.float64),
                    np.array(healthy),
                    np.array(successes),
                    self._dt,
                )
            )
            self._steps[index] = []


def check_humanoid(env_id: str) -> None:
    """
    :param env_id: Id of an env
    :raises ValueError: if it is none of a humanoid
    """
    if ENV_TABLE.get(env_id, {}).get("robot") != "humanoid":
        raise ValueError(
            f"Gaits are those of a humanoid, but {env_id!r} is no such env of this package: "
            "use for instance HumanoidGoal-v0 or HumanoidUMaze-v0"
        )


def maze_of(env_id: str, env_kwargs: dict[str, Any] | None = None) -> MazeMap | None:
    """
    :param env_id: Id of one of this package's envs
    :param env_kwargs: Its arguments
    :return: Its maze, None on the open field
    """
    env = make_single_env(env_id, env_kwargs)
    maze = MazeMap.find(env)
    env.close()
    return maze


def record_trajectories(
    model: PolicyPredictor,
    env_id: str,
    n_episodes: int = 64,
    env_kwargs: dict[str, Any] | None = None,
    seed: int = EVAL_SEED,
    deterministic: bool = True,
) -> list[Trajectory]:
    """
    Let a model play, for instance one that was loaded with ``DeepCRL.load()``.

    :param model: Anything that has ``predict``
    :param env_id: Id of one of this package's humanoid envs
    :param n_episodes: Number of episodes
    :param env_kwargs: Arguments of the env
    :param seed: Seed of the episodes
    :param deterministic: Whether to use deterministic or stochastic actions
    :return: What was recorded of each episode
    :raises ValueError: if it is not a humanoid's env, or the number of episodes is not positive
    """
    check_humanoid(env_id)
    if n_episodes < 1:
        raise ValueError(f"`n_episodes` must be at least 1, got {n_episodes}")
    env = make_env(env_id, min(n_episodes, 64), seed, env_kwargs)
    recorder = TrajectoryRecorder(env)
    evaluate_policy(model, env, n_episodes, deterministic, callback=recorder, warn=False)
    env.close()
    return recorder.trajectories


def walk_episodes(
    model: PolicyPredictor, env_id: str, n_episodes: int = 64, env_kwargs: dict[str, Any] | None = None, seed: int = EVAL_SEED
) -> list[WalkEpisode]:
    """
    How a model walks, for instance one that was loaded with ``DeepCRL.load()``.

    :param model: Anything that has ``predict``
    :param env_id: Id of one of this package's humanoid envs
    :param n_episodes: Number of episodes
    :param env_kwargs: Arguments of the env
    :param seed: Seed of the episodes
    :return: What each episode shows
    :raises ValueError: if it is not a humanoid's env, or the number of episodes is not positive
    """
    trajectories = record_trajectories(model, env_id, n_episodes, env_kwargs, seed)
    maze = maze_of(env_id, env_kwargs)
    return [walk_episode(trajectory, maze) for trajectory in trajectories]


def shares(episodes: Sequence[WalkEpisode]) -> list[float]:
    """
    :param episodes: At least one episode
    :return: Share of each of ``CLASSES``, in that order
    """
    return [float(np.mean([episode.kind == kind for episode in episodes])) for kind in CLASSES]


def heights_over_time(trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, np.ndarray]:
    """
    :param trajectories: Recorded episodes
    :return: Height of the torso at the start and after each step, not a number after a fall, shape
        ``(n_episodes, n_steps + 1)`` for the longest episode; and whether the humanoid was upright, same shape
    """
    n_steps = max(len(trajectory.healthy) for trajectory in trajectories)
    heights = np.full((len(trajectories), n_steps + 1), np.nan)
    upright = np.zeros(heights.shape, dtype=bool)
    for i, trajectory in enumerate(trajectories):
        z = trajectory.positions[trajectory.upright, 2]
        heights[i, : len(z)] = z
        upright[i, : len(z)] = True
        if trajectory.fall_step is None:
            upright[i, len(z) :] = True
        else:
            upright[i, trajectory.fall_step] = False
    return heights, upright


@dataclass
class Gaits:
    """
    What the seeds of one depth did.

    :param timesteps: Number of env steps of each seed's model
    :param trajectories: What was recorded of each seed's episodes
    :param episodes: What they show
    """

    timesteps: list[int] = field(default_factory=list)
    trajectories: list[list[Trajectory]] = field(default_factory=list)
    episodes: list[list[WalkEpisode]] = field(default_factory=list)


@dataclass
class WalkStudy(ComparisonOfDepths):
    """
    How humanoids of several depths move: fall time, height of the torso, distances, and a class for each episode, such as
    walking, throwing itself at the goal, or going over the wall (section 4.3 of the paper).
    """

    name: ClassVar[str] = "walk"
    summary: ClassVar[str] = "how humanoids of several depths move, and how they fall"

    env: str = option("HumanoidGoal-v0", "Env of a humanoid that is trained on")
    depths: list[int] = option([4, 16], "Depths")

    def __post_init__(self) -> None:
        super().__post_init__()
        for env_id in (self.env, self.eval_env):
            check_humanoid(env_id)

    def report(self, results: Results, runs: Path) -> Report:
        maze = maze_of(self.eval_env, self.env_kwargs)
        gaits = {label: Gaits() for label in results}
        for depth, _, model in self.models(runs):
            trajectories = record_trajectories(model, self.eval_env, self.n_eval_episodes, self.env_kwargs)
            gait = gaits[f"depth {depth}"]
            gait.timesteps.append(model.num_timesteps)
            gait.trajectories.append(trajectories)
            gait.episodes.append([walk_episode(trajectory, maze) for trajectory in trajectories])
        return self.report_of(gaits)

    def report_of(self, gaits: dict[str, Gaits]) -> Report:
        """
        :param gaits: What the seeds of each depth did
        :return: What came out
        """
        rows = []
        for label, gait in gaits.items():
            for seed, (timesteps, episodes) in enumerate(zip(gait.timesteps, gait.episodes, strict=True)):
                for number, episode in enumerate(episodes):
                    values = {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(episode).items()}
                    head = {"setting": label, "seed": seed, "timesteps": timesteps, "episode": number}
                    rows.append({**head, **values, "fall_step": "" if episode.fall_step is None else episode.fall_step})
        notes = [
            f"Trained on {self.env}. Each seed plays {self.n_eval_episodes} episodes of {self.eval_env}, the same for all, "
            f"with deterministic actions. Shares of the episodes: {self.averaging().lower()}. "
            "Reached the goal is a share too. The other rows are medians over the episodes, that of the fall over those "
            "with one; what comes after a fall does not count. A fall is a torso out of the healthy heights.",
            f"Goes over the wall: the torso was above a wall, at least {OVER_WALL:g} of a cell inside. Walks: stayed at the "
            f"goal for {STAY_SECONDS:g} s, or never fell and got further than {STANDING_RADIUS:g} m or to the goal. Stands: "
            f"never fell otherwise. Falls at the goal: at most {AT_GOAL:g} m from it, after at least {APPROACH:g} of the "
            "distance at the start. Falls on the way: all other falls.",
        ]
        columns = {label: self._table_column(gait) for label, gait in gaits.items()}
        measures = next(iter(columns.values()))
        table = [{"": measure, **{label: column[measure] for label, column in columns.items()}} for measure in measures]
        return Report(f"Gaits on {self.eval_env}", rows, table, notes, self._figure(gaits))

    @staticmethod
    def _table_column(gait: Gaits) -> dict[str, Any]:
        episodes = [episode for seed in gait.episodes for episode in seed]
        dt = gait.trajectories[0][0].dt
        falls = [episode.fall_step * dt for episode in episodes if episode.fall_step is not None]

        def median(name: str) -> str:
            return f"{np.median([getattr(episode, name) for episode in episodes]):.2f}"

        return {
            **dict(zip(CLASSES, interquartile_mean(np.array([shares(seed) for seed in gait.episodes])), strict=True)),
            "reached the goal": f"{np.mean([episode.reached for episode in episodes]):.2f}",
            "fall after (s)": f"{np.median(falls):.1f}" if falls else "-",
            "mean height of the torso (m)": median("mean_height"),
            "lowest height of the torso (m)": median("min_height"),
            "distance travelled (m)": median("distance_travelled"),
            "closest distance to the goal (m)": median("closest_distance"),
            "distance to the goal at the end (m)": median("final_distance"),
        }

    def _figure(self, gaits: dict[str, Gaits]) -> Any:
        from matplotlib import colormaps

        figure, axes = new_figure(1, 3, width=4.6)
        height_ax, upright_ax, share_ax = axes[0]
        colors = depth_colors(self.depths)
        for depth, (label, gait) in zip(self.depths, gaits.items(), strict=True):
            trajectories = [trajectory for seed in gait.trajectories for trajectory in seed]
            heights, upright = heights_over_time(trajectories)
            seconds = np.arange(heights.shape[1]) * trajectories[0].dt
            # Nobody may be upright at the end
            n = int(np.flatnonzero(~np.isnan(heights).all(axis=0))[-1]) + 1
            low, middle, high = np.nanpercentile(heights[:, :n], (10, 50, 90), axis=0)
            height_ax.plot(seconds[:n], middle, color=colors[depth], label=label)
            height_ax.fill_between(seconds[:n], low, high, color=colors[depth], alpha=0.2, linewidth=0)
            upright_ax.plot(seconds, upright.mean(axis=0), color=colors[depth], label=label)
        height_ax.set(xlabel="seconds", ylabel="height of the torso (m)", title="Those upright: median and 80 %")
        upright_ax.set(xlabel="seconds", ylabel="share of the episodes", ylim=(-0.02, 1.02), title="Still upright")
        height_ax.legend()
        bottom = np.zeros(len(gaits))
        means = np.array([np.mean([shares(seed) for seed in gait.episodes], axis=0) for gait in gaits.values()])
        for kind, share, color in zip(
            CLASSES, means.T, colormaps["RdYlGn_r"](np.linspace(0.1, 0.9, len(CLASSES))), strict=True
        ):
            share_ax.bar(list(gaits), share, bottom=bottom, color=color, label=kind, width=0.6)
            bottom += share
        share_ax.set(ylabel="share of the episodes", ylim=(0, 1), title="What happened")
        handles, labels = share_ax.get_legend_handles_labels()
        share_ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.02, 0.5))
        figure.suptitle(self.caption())
        return figure
