from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np


class SingleGoalWrapper(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """
    Ask for a single goal, in all episodes. With contrastive RL, whose other goals are the states that were reached, this is
    SGCRL (https://arxiv.org/abs/2408.05804): an agent that is only ever asked for one hard goal explores on its way there.

    The reward is that of ``compute_reward`` for this goal, and ``is_success`` and ``success`` in the info tell what the env's
    ``_is_success`` says of it; where there is none, whether the reward, which must be sparse, is as high as that of being
    there. The env starts and ends episodes as it does for its own goals; this package's envs make the goal their own.

    In a config of RL Zoo: ``env_wrapper: [{sb3_deepcrl.envs.wrappers.SingleGoalWrapper: {goal: [8.0, 2.0]}}]``.

    :param env: Goal-conditioned environment with ``compute_reward``
    :param goal: The goal, with the form of ``desired_goal``
    :raises ValueError: if it has another form, or if the env has no ``compute_reward``
    """

    def __init__(self, env: gym.Env, goal: Any):
        gym.utils.RecordConstructorArgs.__init__(self, goal=goal)
        gym.Wrapper.__init__(self, env)
        space = env.observation_space
        desired = space.spaces.get("desired_goal") if isinstance(space, gym.spaces.Dict) else None
        if desired is None:
            raise ValueError(f"The observations of {env} have no `desired_goal`, only {space}: do not wrap this env")
        self.goal = np.asarray(goal, dtype=desired.dtype)
        if self.goal.shape != desired.shape or not np.isfinite(self.goal).all():
            raise ValueError(f"`goal` must be finite and of shape {desired.shape}, as `desired_goal` is, got {goal!r}")
        if not env.has_wrapper_attr("compute_reward"):
            raise ValueError(f"{env} has no `compute_reward`, which tells the reward of another goal: add it to the env")
        self._can_be_asked = hasattr(env.unwrapped, "goal_mode")

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        """That of the env."""
        return self.env.get_wrapper_attr("compute_reward")(achieved_goal, desired_goal, info)

    def _succeeded(self, achieved_goal: Any, reward: float, info: Any) -> bool:
        if self.env.has_wrapper_attr("_is_success"):
            return bool(self.env.get_wrapper_attr("_is_success")(achieved_goal, self.goal))
        return reward >= float(self.compute_reward(self.goal, self.goal, info))

    def _with_goal(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {**observation, "desired_goal": self.goal.copy()}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self._can_be_asked:
            options = {**(options or {}), "goal": self.goal}
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_goal(observation), info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = self.env.step(action)
        reward = float(self.compute_reward(observation["achieved_goal"], self.goal, info))
        info["is_success"] = info["success"] = self._succeeded(observation["achieved_goal"], reward, info)
        if self._can_be_asked and info["is_success"]:
            # There may be another one now
            self.env.unwrapped.goal = self.goal  # type: ignore[attr-defined]
        return self._with_goal(observation), reward, terminated, truncated, info


class SuccessInfoWrapper(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """
    Report ``info["success"]``, the key of the mazes of gymnasium-robotics, as ``info["is_success"]`` too,
    the key that Stable-Baselines3 and RL Zoo log as success rate. Envs that report the latter stay as they are.

    In a config of RL Zoo: ``env_wrapper: sb3_deepcrl.envs.wrappers.SuccessInfoWrapper``.

    :param env: The environment to wrap
    """

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "is_success" not in info:
            if "success" not in info:
                raise ValueError(f"The info of {self.env} has no key `success`, only {sorted(info)}: do not wrap this env")
            info["is_success"] = bool(info["success"])
        return observation, reward, terminated, truncated, info
