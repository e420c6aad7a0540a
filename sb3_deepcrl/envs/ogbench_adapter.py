from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding


class OGBenchGoalWrapper(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """
    An online maze environment of OGBench (pointmaze, antmaze, humanoidmaze, antsoccer) as a goal environment::

        import ogbench  # registers the ids; no data set is downloaded

        env = OGBenchGoalWrapper(gym.make("antmaze-medium-v0", terminate_at_goal=False))

    The goal is the commanded x and y; the achieved goal is the position of the robot, or of the ball in antsoccer.
    Observations are dicts in float32. The reward is 1 within OGBench's goal tolerance and 0 elsewhere; ``is_success`` and
    ``success`` in the info say the same, ``distance`` is in meters. Numbers measured here are online ones: they do not compare
    with OGBench's offline tables.

    OGBench draws tasks and noise from NumPy's global random numbers, so a seed given to ``reset`` has no effect on them. The
    wrapper gives it random numbers that follow the seed, and leaves the global ones untouched.

    :param env: The environment. Without ``terminate_at_goal=False`` an episode ends as soon as the goal is reached
    :raises ValueError: if it is no maze with positions as goals
    """

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        core: Any = env.unwrapped
        if not hasattr(core, "cur_goal_xy") or not hasattr(core, "get_xy"):
            raise ValueError(
                f"{core!r} is no maze of OGBench. OGBenchGoalWrapper takes pointmaze, antmaze, humanoidmaze and antsoccer ids."
            )
        space = env.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"{core!r} observes pictures, but goals are compared as positions. Use an id without 'visual'.")
        # OGBench has no public names of its task and of the tolerance
        if core._reward_task_id is not None:
            raise ValueError(f"{core!r} has a single fixed task. Use an id without 'singletask'.")
        self.core, self.tolerance = core, float(core._goal_tol)
        observation = spaces.Box(-np.inf, np.inf, space.shape, np.float32)
        goal = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = spaces.Dict(observation=observation, achieved_goal=goal, desired_goal=goal)
        self._legacy_state = self._new_legacy_state(None)

    def _new_legacy_state(self, seed: int | None) -> Any:
        # The action space is seeded too: OGBench settles the robot with sampled actions in reset()
        first, second = (int(value) for value in seeding.np_random(seed)[0].integers(2**31, size=2))
        self.core.action_space.seed(second)
        return np.random.RandomState(first).get_state()

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        outside = np.random.get_state()
        np.random.set_state(self._legacy_state)
        try:
            yield
        finally:
            self._legacy_state = np.random.get_state()
            np.random.set_state(outside)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if seed is not None:
            self._legacy_state = self._new_legacy_state(seed)
        with self._own_random_numbers():
            observation, info = self.env.reset(seed=seed, options=options)
        return self._goal_observation(observation), info

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        with self._own_random_numbers():
            observation, _, terminated, truncated, info = self.env.step(action)
        converted = self._goal_observation(observation)
        distance = float(np.linalg.norm(converted["achieved_goal"] - converted["desired_goal"]))
        success = distance <= self.tolerance
        info.update(is_success=success, success=success, distance=distance)
        return converted, float(success), terminated, truncated, info

    def _goal_observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        ball = hasattr(self.core, "get_agent_ball_xy")
        achieved = self.core.get_agent_ball_xy()[1] if ball else self.core.get_xy()
        return {
            "observation": np.asarray(observation, dtype=np.float32),
            "achieved_goal": np.array(achieved, dtype=np.float32),
            "desired_goal": np.array(self.core.cur_goal_xy, dtype=np.float32),
        }

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        """Rewards in float32, shape (...), of goals of shape (..., 2), whatever happened on the way. HER calls it."""
        distance = np.linalg.norm(np.asarray(achieved_goal) - np.asarray(desired_goal), axis=-1)
        return (distance <= self.tolerance).astype(np.float32)
