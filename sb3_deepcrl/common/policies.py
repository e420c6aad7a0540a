import numpy as np
from stable_baselines3.common.policies import BasePolicy

from sb3_deepcrl.common.utils import check_actions


class CheckedPolicy(BasePolicy):
    """
    Policy whose actions are numbers. To be put before the policy of Stable-Baselines3 in the list of bases.
    """

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation, see :meth:`~stable_baselines3.common.policies.BasePolicy.predict`.

        :raises ValueError: if an action is NaN or infinite, telling whether weights or observation are at fault
        """
        actions, state = super().predict(observation, state, episode_start, deterministic)
        check_actions(actions, observation, self)
        return actions, state
