from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn


def check_class(value: Any, base: type, name: str, fix: str) -> None:
    """
    :param value: What the user chose: a class, or a function that makes an instance
    :param base: What its instances have to be
    :param name: What the choice is called in the error message
    :param fix: What to do instead
    :raises ValueError: if it is another class, an instance, or nothing that can be called
    """
    is_suitable = issubclass(value, base) if isinstance(value, type) else callable(value) and not isinstance(value, nn.Module)
    if not is_suitable:
        raise ValueError(f"`{name}` must be {base.__name__} or a subclass of it, got {value!r}: {fix}")


def check_dict(value: Any, name: str) -> None:
    """
    :param value: Keyword arguments that the user gave, None for none
    :param name: What they are called in the error message
    :raises ValueError: if it is no dict
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"`{name}` must be a dict of keyword arguments, got {value!r}: use for instance `dict(name=value)`")


def check_policy_kwargs(policy_kwargs: Mapping[str, Any]) -> None:
    """
    Check the arguments that all policies have.

    :param policy_kwargs: Arguments of a policy
    :raises ValueError: if one of them is of another kind
    """
    extractor = policy_kwargs.get("features_extractor_class", BaseFeaturesExtractor)
    check_class(extractor, BaseFeaturesExtractor, "features_extractor_class", "pass the class, such as `CombinedExtractor`")
    optimizer = policy_kwargs.get("optimizer_class", th.optim.Optimizer)
    check_class(optimizer, th.optim.Optimizer, "optimizer_class", "pass the class, such as `th.optim.Adam`")
    for name in ("features_extractor_kwargs", "optimizer_kwargs"):
        check_dict(policy_kwargs.get(name), name)
    if "lr" in (policy_kwargs.get("optimizer_kwargs") or {}):
        raise ValueError(
            f"`optimizer_kwargs` has `lr={policy_kwargs['optimizer_kwargs']['lr']!r}`, but the learning rate follows a "
            "schedule: give it as `learning_rate`"
        )


def check_actions(actions: Any, observation: Any, policy: Any) -> None:
    """
    Check that what a policy gave are numbers, as the actions of a network are not once its weights are not.

    :param actions: Actions as a NumPy array
    :param observation: What it saw: an array, or arrays by key
    :param policy: Who gave them: a policy, an algorithm that has one, or anything else
    :raises ValueError: if an action is NaN or infinite, telling whether weights or observation are at fault
    """
    actions = np.asarray(actions)
    if actions.dtype.kind != "f" or np.isfinite(actions).all():
        return
    policy = getattr(policy, "policy", policy)
    # The critic has no part in them
    network = getattr(policy, "actor", policy)
    parameters = network.named_parameters() if isinstance(network, nn.Module) else ()
    faults = [
        f"the weights `{name}` are not finite, since training diverged (load an earlier checkpoint, lower `learning_rate`)"
        for name, values in parameters
        if not th.isfinite(values).all()
    ][:1]
    for key, value in observation.items() if isinstance(observation, Mapping) else [("observation", observation)]:
        value = np.asarray(value)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            where = tuple(np.argwhere(~np.isfinite(value))[0].tolist())
            faults.append(f"`{key}` of the observation is {value[where]} at {where} (check the env, e.g. with `VecCheckNan`)")
    reason = " and ".join(faults) or (
        "its weights and the observation are finite, so that numbers on the way are too large (normalize the observations, "
        "e.g. with `VecNormalize`)"
    )
    raise ValueError(f"The policy gives actions that are NaN or infinite: {reason}")


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

        :param observation: the input observation
        :param state: The last hidden states (can be None, used in recurrent policies)
        :param episode_start: The last masks (can be None, used in recurrent policies)
        :param deterministic: Whether or not to return deterministic actions.
        :return: the model's action and the next hidden state
        :raises ValueError: if an action is NaN or infinite, telling whether weights or observation are at fault
        """
        actions, state = super().predict(observation, state, episode_start, deterministic)
        check_actions(actions, observation, self)
        return actions, state
