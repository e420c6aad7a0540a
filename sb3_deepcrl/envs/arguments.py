"""
What an env can be called with, and what it is made with if nobody says.
"""

import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator

from sb3_deepcrl.envs.registration import ENTRY_POINT

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Arguments(NamedTuple):
    """
    What a class or function can be called with.

    :param defaults: Its own arguments that have a default, with that
    :param names: Names of all known arguments, those of the base classes to which it may hand on ``**kwargs`` included
    :param takes_others: Whether it has ``**kwargs``, so that only a call tells which others it knows
    """

    defaults: dict[str, Any]
    names: tuple[str, ...]
    takes_others: bool


def arguments_of(function: Callable[..., Any]) -> Arguments:
    """
    :param function: A class or function
    :return: Its arguments
    """
    functions: list[Any] = [function]
    if is_class := isinstance(function, type):
        functions = [vars(base)["__init__"] for base in function.__mro__ if "__init__" in vars(base)]
    found: dict[str, inspect.Parameter] = {}
    defaults: dict[str, Any] = {}
    takes_others = True
    for index, each in enumerate(functions):
        try:
            # The first one of a method is the object
            parameters = list(inspect.signature(each).parameters.values())[is_class:]
        except (TypeError, ValueError):
            # Not written in Python
            break
        found.update({parameter.name: parameter for parameter in parameters if parameter.kind in NAMED})
        hands_on = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        if index == 0:
            defaults = {name: item.default for name, item in found.items() if item.default is not item.empty}
            # It may also read them itself, whatever its base classes know
            takes_others = hands_on
        if not hands_on:
            break
    return Arguments(defaults, tuple(found), takes_others)


def arguments_of_env(spec: EnvSpec) -> Arguments:
    """
    :param spec: Specification of an env
    :return: What ``gym.make`` takes for it
    """
    creator = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    if creator is None:
        # `gym.make` has a message for that
        return Arguments({}, (), True)
    defaults, names, takes_others = arguments_of(creator)
    if spec.entry_point == ENTRY_POINT:
        # All others of this env are those of its task
        from sb3_deepcrl.envs.task import GoalTask

        of_task = arguments_of(GoalTask)
        defaults, names, takes_others = {**defaults, **of_task.defaults}, (*names, *of_task.names), False
    defaults = {**defaults, "max_episode_steps": spec.max_episode_steps, **spec.kwargs}
    return Arguments(defaults, (*names, *(name for name in arguments_of(gym.make).names if name != "id")), takes_others)


def advice_for(name: str, known: Sequence[str]) -> str:
    """
    :param name: A name that does not exist
    :param known: Those that do
    :return: What to use in its place, in words
    """
    near = difflib.get_close_matches(name, known, 1)
    return f"Did you mean {near[0]!r}?" if near else f"Choose from: {', '.join(known)}"


def check_env_kwargs(spec: EnvSpec, env_kwargs: Mapping[str, Any]) -> None:
    """
    :param spec: Specification of an env
    :param env_kwargs: Arguments of the env
    :raises ValueError: if it does not know one, as far as can be told without making it
    """
    known = arguments_of_env(spec)
    for name in env_kwargs:
        if name not in known.names and not known.takes_others:
            raise _unknown(spec, env_kwargs, name)


@contextlib.contextmanager
def checked_env_kwargs(spec: EnvSpec, env_kwargs: Mapping[str, Any]) -> Iterator[None]:
    """
    Make an env in here: an argument that it does not know is told, and whatever else goes wrong in it is left alone.

    :param spec: Specification of the env
    :param env_kwargs: Arguments of the env
    :raises ValueError: if it does not know one
    """
    check_env_kwargs(spec, env_kwargs)
    try:
        yield
    except TypeError as error:
        # Where `**kwargs` go, only the call tells
        match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if match and match[1] in env_kwargs and match[1] not in arguments_of_env(spec).names:
            raise _unknown(spec, env_kwargs, match[1]) from error
        raise


def _unknown(spec: EnvSpec, env_kwargs: Mapping[str, Any], name: str) -> ValueError:
    advice = advice_for(name, arguments_of_env(spec).names)
    return ValueError(f"{spec.id} cannot be made with `env_kwargs` {dict(env_kwargs)}: it has no argument {name!r}. {advice}")
