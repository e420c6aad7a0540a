"""
What an env is made with if nobody says, and one clear line about an argument that it does not know.
"""

import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator

from sb3_deepcrl.envs.registration import ENTRY_POINT


def default_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a class or function that have a default, with that."""
    parameters = inspect.signature(function).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not item.empty}


def default_env_kwargs(spec: EnvSpec) -> dict[str, Any]:
    """What ``gym.make`` makes an env with if nobody says, as far as signatures tell."""
    defaults = {name: value for function in _makers(spec) for name, value in default_arguments(function).items()}
    return {**defaults, "max_episode_steps": spec.max_episode_steps, **spec.kwargs}


@contextlib.contextmanager
def checked_env_kwargs(spec: EnvSpec, env_kwargs: Mapping[str, Any]) -> Iterator[None]:
    """
    Make an env in here. An argument that it does not know is refused before that, if signatures tell, as the error of another
    process cannot be read; if only the call tells, its error is made one clear line.

    :raises ValueError: if the env does not know an argument
    """
    parameters = [item for function in _makers(spec) for item in inspect.signature(function).parameters.values()]
    known = [item.name for item in parameters if item.kind != item.VAR_KEYWORD] + [*default_arguments(gym.make)]
    # Those that the env of this package hands on are the ones of its task
    takes_others = spec.entry_point != ENTRY_POINT and any(item.kind == item.VAR_KEYWORD for item in parameters)
    unknown = [name for name in env_kwargs if name not in known]
    try:
        if not unknown or takes_others:
            yield
            return
    except TypeError as error:
        match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if match is None or match[1] not in unknown:
            raise
        unknown = [match[1]]
    near = difflib.get_close_matches(unknown[0], known, 1)
    advice = f"Did you mean {near[0]!r}?" if near else f"Choose from: {', '.join(known)}"
    raise ValueError(
        f"{spec.id} cannot be made with `env_kwargs` {dict(env_kwargs)}: it has no argument {unknown[0]!r}. {advice}"
    )


def _makers(spec: EnvSpec) -> list[Callable[..., Any]]:
    if spec.entry_point == ENTRY_POINT:
        from sb3_deepcrl.envs.goal_env import GoalEnv, GoalTask

        return [GoalEnv, GoalTask]
    creator: Any = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    return [] if creator is None else [creator]
