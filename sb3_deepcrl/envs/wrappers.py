from typing import Any, SupportsFloat

import gymnasium as gym
from gymnasium.core import ActType, ObsType


class SuccessInfoWrapper(gym.Wrapper[ObsType, ActType, ObsType, ActType]):
    """
    Copy ``info["success"]`` to ``info["is_success"]``. Stable-Baselines3 and RL Zoo report success rates from the second key,
    while the mazes of gymnasium-robotics write the first one.

    ``compute_reward`` is passed through, so that HER still finds it. Usable from a zoo config:
    ``env_wrapper: sb3_deepcrl.envs.wrappers.SuccessInfoWrapper``.

    :param env: Environment whose infos hold "success"
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[ObsType, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, _with_is_success(info)

    def step(self, action: ActType) -> tuple[ObsType, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "success" not in info:
            raise ValueError(
                f"The info of {self.env.unwrapped!r} has no 'success', only {sorted(info)}. SuccessInfoWrapper is for "
                "environments that write it; leave it out here."
            )
        return observation, reward, terminated, truncated, _with_is_success(info)

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        """
        :param achieved_goal: Goals reached
        :param desired_goal: Goals wanted
        :param info: Info of the step
        :return: Rewards of the wrapped environment
        """
        return self.env.get_wrapper_attr("compute_reward")(achieved_goal, desired_goal, info)


def _with_is_success(info: dict[str, Any]) -> dict[str, Any]:
    # A reset info may lack the key
    return {**info, "is_success": bool(info["success"])} if "success" in info else info
