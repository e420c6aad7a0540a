from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_deepcrl.common.utils import check_class, check_dict


class CheckedPolicy(BasePolicy):
    """
    Policy whose arguments are checked, and whose actions are numbers. To be put before the policy of Stable-Baselines3 in the
    list of bases.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        for name, base, example in (
            ("features_extractor_class", BaseFeaturesExtractor, "CombinedExtractor"),
            ("optimizer_class", th.optim.Optimizer, "th.optim.Adam"),
        ):
            check_class(kwargs.get(name, base), base, name, f"pass the class, such as `{example}`")
        for name in ("features_extractor_kwargs", "optimizer_kwargs"):
            check_dict(kwargs.get(name), name)
        if "lr" in (kwargs.get("optimizer_kwargs") or {}):
            raise ValueError(
                f"`optimizer_kwargs` has `lr={kwargs['optimizer_kwargs']['lr']!r}`, but the learning rate follows a schedule: "
                "give it as `learning_rate`"
            )
        super().__init__(*args, **kwargs)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation, see :meth:`~stable_baselines3.common.policies.BasePolicy.predict`.

        :raises ValueError: if an action is NaN or infinite (or a discrete one -1, as no probability was a number), telling
            whether weights or observation are at fault
        """
        try:
            actions, state = super().predict(observation, state, episode_start, deterministic)
        except ValueError as error:
            # Distributions refuse such parameters
            if faults := self._faults(observation):
                raise ValueError(f"The policy gives actions that are NaN or infinite: {' and '.join(faults)}") from error
            raise
        if np.isfinite(actions).all() and (isinstance(self.action_space, spaces.Box) or (actions >= 0).all()):
            return actions, state
        reason = " and ".join(self._faults(observation)) or (
            "its weights and the observation are finite, so that numbers on the way are too large (normalize the "
            "observations, e.g. with `VecNormalize`)"
        )
        raise ValueError(f"The policy gives actions that are NaN or infinite: {reason}")

    def _faults(self, observation: np.ndarray | dict[str, np.ndarray]) -> list[str]:
        """What is not finite: weights, or the observation."""
        # The critic has no part in the actions
        faults = [
            f"the weights `{name}` are not finite, since training diverged (load an earlier checkpoint, lower `learning_rate`)"
            for name, values in getattr(self, "actor", self).named_parameters()
            if not th.isfinite(values).all()
        ][:1]
        for key, value in observation.items() if isinstance(observation, Mapping) else [("observation", observation)]:
            # Whatever else was passed, Stable-Baselines3 tells
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                where = tuple(np.argwhere(~np.isfinite(value))[0].tolist())
                faults.append(f"`{key}` of the observation is {value[where]} at {where} (check the env with `VecCheckNan`)")
        return faults
