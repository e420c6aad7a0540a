from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle

from sb3_deepcrl.envs.rendering import TaskRenderer
from sb3_deepcrl.envs.simulation import Simulation
from sb3_deepcrl.envs.task import GoalTask


def _task_attribute(name: str) -> Any:
    return property(lambda self: getattr(self.task, name), lambda self, value: self.task.set(name, value))


class TaskView:
    """One environment of a simulation: what of it may be seen and set while it runs."""

    __slots__ = ()
    task: GoalTask
    simulation: Simulation
    renderer: TaskRenderer
    index: int

    reward_type = _task_attribute("reward_type")
    goal_mode = _task_attribute("goal_mode")
    success_threshold = _task_attribute("success_threshold")

    @property
    def goal(self) -> np.ndarray:
        """The goal of the running episode in meters. It may be set."""
        return self.simulation.goals[self.index].copy()

    @goal.setter
    def goal(self, goal: np.ndarray) -> None:
        position = self.simulation.batch.bind("qpos")[self.index, self.task.robot.start_address]
        self.simulation.goals[self.index] = self.task.check_goal(goal, position)

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> Any:
        """See :meth:`~sb3_deepcrl.envs.task.GoalTask.compute_reward`."""
        return self.task.compute_reward(achieved_goal, desired_goal, info)

    def _is_success(self, achieved_goal: np.ndarray, desired_goal: np.ndarray) -> Any:
        """Whether a goal is reached. SingleGoalWrapper calls it, as the robots of gymnasium-robotics have it."""
        return self.task.goal_distance(achieved_goal, desired_goal) < self.success_threshold

    def render(self) -> np.ndarray | None:
        """RGB picture of shape (height, width, 3), None without a render mode."""
        return self.renderer.render(self.simulation, self.index)


class GoalEnv(TaskView, gym.Env, EzPickle):  # type: ignore[misc]
    """
    A goal-reaching task as a Gymnasium environment: the batch of one.

    Observations are dicts with "observation", "achieved_goal" and "desired_goal" in float32; nothing in "observation" depends
    on the goal. An episode never ends at the goal: the paper counts the steps spent there. The time limit is Gymnasium's
    ``TimeLimit``: set it with ``gym.make(id, max_episode_steps=...)``.

    The info of a step holds ``is_success`` and ``success`` (the distance is below the threshold), ``distance`` in meters,
    ``success_easy`` and ``success_hard`` where the robot defines them, ``is_healthy`` where it can fall, and ``diverged`` in
    the rare step in which the physics broke down.

    ``reset(options={"start": ..., "goal": ...})`` sets the start (x and y of the robot, or of the arm's cube) and the goal of
    an episode, in meters.

    ``goal_mode``, ``reward_type``, ``success_threshold`` and ``goal``, the goal of the running episode, may be set on a
    running env. Through wrappers this takes ``set_wrapper_attr``, and through any vectorized environment
    ``env_method("set_wrapper_attr", name, value)``: ``set_attr`` of SB3's own ones sets an attribute of the outermost
    wrapper, without effect.

    An env is pickled as its arguments: a copy starts afresh.

    :param render_mode: None or "rgb_array"
    :param camera: "follow" or "top_down"
    :param width: Width of a picture in pixels
    :param height: Height of a picture in pixels
    :param task_kwargs: Arguments of :class:`~sb3_deepcrl.envs.task.GoalTask`, e.g. ``robot="ant", maze="u4"``
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}  # type: ignore[misc]
    index = 0

    def __init__(
        self, render_mode: str | None = None, camera: str = "follow", width: int = 480, height: int = 480, **task_kwargs: Any
    ):
        #: Arguments with which the pictures are made
        self.picture: dict[str, Any] = {"render_mode": render_mode, "camera": camera, "width": width, "height": height}
        EzPickle.__init__(self, **self.picture, **task_kwargs)
        self.render_mode = render_mode
        self.task_kwargs = task_kwargs
        self.task = GoalTask(**task_kwargs)
        self.observation_space = self.task.observation_space
        self.action_space = self.task.action_space
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": self.task.render_fps}  # type: ignore[misc]
        self.renderer = TaskRenderer(self.task, **self.picture)
        self.simulation = Simulation(self.task, n_envs=1, n_threads=1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """
        Start an episode.

        :param seed: Seed of the random numbers; None goes on with the present ones
        :param options: "start" and "goal" in meters, both optional
        :return: Observation and info
        """
        super().reset(seed=seed)
        if seed is not None or self.simulation.generators[0] is not self.np_random:
            self.simulation.seed(0, self.np_random)
        observation, info = self.simulation.reset(np.zeros(1, dtype=np.int64), [self.task.check_options(options)])
        return {key: value[0] for key, value in observation.items()}, {key: value[0] for key, value in info.items()}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """
        Advance by one control step.

        :param action: Action in [-1, 1]
        :return: Observation, reward, terminated, truncated (only if the physics diverged) and info
        """
        result = self.simulation.step(np.asarray(action)[None])
        diverged = bool(result.diverged[0])
        info = {key: value[0] for key, value in result.info.items()}
        if diverged:
            info["diverged"] = True
        observation = {key: value[0] for key, value in result.observation.items()}
        return observation, float(result.reward[0]), bool(result.terminated[0]), diverged, info

    def close(self) -> None:
        """Free the rendering context. A closed environment cannot be used any more."""
        self.simulation.close()
        self.renderer.close()
