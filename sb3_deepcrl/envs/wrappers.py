from typing import Any, SupportsFloat

import gymnasium as gym


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
