"""
Small goal-conditioned envs for the tests.
"""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces


def add_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A package ``elsewhere`` that registers ``ElsewhereReach-v0`` when it is imported, which it is not yet.

    :param folder: Where to put it
    :param monkeypatch: The fixture
    """
    (folder / "elsewhere.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('ElsewhereReach-v0', entry_point='tests.envs:GoalReachEnv', max_episode_steps=10)\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "elsewhere", raising=False)
    monkeypatch.delitem(gym.registry, "ElsewhereReach-v0", raising=False)


class GoalReachEnv(gym.Env):
    """
    A point on a plane that moves by its action and starts next to its goal.

    :param max_steps: Length of an episode
    :param action_scale: Bound of the actions
    :param obs_dtype: Type of the observations
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, max_steps: int = 10, action_scale: float = 1.0, obs_dtype: type = np.float64):
        self.max_steps = max_steps
        box = spaces.Box(-10.0, 10.0, (2,), obs_dtype)
        self.observation_space = spaces.Dict(
            observation=spaces.Box(-10.0, 10.0, (3,), obs_dtype), achieved_goal=box, desired_goal=box
        )
        self.action_space = spaces.Box(-action_scale, action_scale, (2,), np.float32)

    def _observation(self) -> dict[str, np.ndarray]:
        dtype = self.observation_space["achieved_goal"].dtype
        return {
            "observation": np.append(self.position, self.steps / self.max_steps).astype(dtype),
            "achieved_goal": self.position.astype(dtype),
            "desired_goal": self.goal.astype(dtype),
        }

    def reset(self, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-2.0, 2.0, (2, 2))
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray):
        self.steps += 1
        self.position = np.clip(self.position + 0.3 * action / self.action_space.high, -10.0, 10.0)
        distance = np.linalg.norm(self.position - self.goal)
        success = bool(distance < 0.5)
        return self._observation(), float(success), False, self.steps >= self.max_steps, {"is_success": success}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        return (np.linalg.norm(achieved_goal - desired_goal, axis=-1) < 0.5).astype(np.float32)


class EpisodeCounterEnv(gym.Env):
    """
    An env whose goals tell where they come from: the achieved goal is (index of the env, episode, step).

    :param index: Index of the env
    :param lengths: Lengths of the episodes, over and over again
    """

    def __init__(self, index: int = 0, lengths: tuple[int, ...] = (5, 3, 9)):
        self.index, self.lengths = index, lengths
        self.episode = -1
        box = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.observation_space = spaces.Dict(observation=box, achieved_goal=box, desired_goal=box)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def _observation(self) -> dict[str, np.ndarray]:
        where = np.array([self.index, self.episode, self.steps], dtype=np.float64)
        return {"observation": where.copy(), "achieved_goal": where.copy(), "desired_goal": np.zeros(3)}

    def reset(self, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.episode += 1
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray):
        self.steps += 1
        ended = self.steps >= self.lengths[self.episode % len(self.lengths)]
        # Terminated and truncated in turn
        terminated = ended and self.episode % 2 == 0
        return self._observation(), 0.0, terminated, ended and not terminated, {"is_success": False}
