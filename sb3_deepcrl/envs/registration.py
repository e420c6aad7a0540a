"""
The Gymnasium ids of this package, and how any id becomes an environment. This module imports nothing but Gymnasium: the
simulator is loaded by ``gym.make``.

============================================ ===============================================================================
``{Robot}{Layout}Maze-v0``                   Point, Ant or Humanoid in the maze U, U2, ..., U7, Big or Hardest, with the
                                             training goals, e.g. ``AntU4Maze-v0``. The point starts in any cell, and has
                                             another goal each time that it reached one
``{Robot}{Layout}MazeEval-v0``               The same maze with the evaluation goals, from the start cell (not Hardest, which
                                             has none of its own, except for the point: it keeps its training goals there)
``{Robot}UMazeStitch-v0``                    Starts and goals at most 3 cells apart (figure 11 of the paper)
``{Robot}UMazeStitchEval-v0``                From the start cell to goals more than 3 cells away
``AntGoal-v0``, ``HumanoidGoal-v0``          Open field
``ArmPushEasy-v0``, ``ArmPushHard-v0``,      Arm and cube on a table
``ArmBinpickHard-v0``
============================================ ===============================================================================

The names have no slash and no colon, so RL Zoo can use them as folder names and as keys of its config files.
"""

import contextlib
import importlib
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, find_highest_version, get_env_id, parse_env_id, register, registry

ENTRY_POINT = "sb3_deepcrl.envs.goal_env:GoalEnv"
# Steps of an episode in the paper (appendix B)
EPISODE_LENGTH = 1000
# The point is fast: crossing the largest maze takes it about 100 steps
POINT_EPISODE_LENGTH = 150
STITCHING_DISTANCE = 3


def _env_table() -> dict[str, dict[str, Any]]:
    """
    :return: Arguments of the task by Gymnasium id
    """
    table: dict[str, dict[str, Any]] = {}
    for robot in ("point", "ant", "humanoid"):
        for layout in ("u", "u2", "u3", "u4", "u5", "u6", "u7", "big", "hardest"):
            name = f"{robot.capitalize()}{layout.capitalize()}Maze"
            # The released code evaluates the humanoid on one goal more in this maze
            maze = "big_humanoid" if (robot, layout) == ("humanoid", "big") else layout
            table[f"{name}-v0"] = {"robot": robot, "maze": maze}
            if robot == "point":
                # A point that knows how to reach near goals is too precise to find the far ones by chance
                table[f"{name}-v0"].update(random_start=True, goal="continuing")
            # Hardest has no evaluation goals of its own, but the point has another start there
            if layout != "hardest" or robot == "point":
                table[f"{name}Eval-v0"] = {"robot": robot, "maze": maze, "goal_set": "eval"}
        stitching = {"robot": robot, "maze": "u", "stitching": STITCHING_DISTANCE}
        table[f"{robot.capitalize()}UMazeStitch-v0"] = stitching
        table[f"{robot.capitalize()}UMazeStitchEval-v0"] = {**stitching, "goal_set": "eval"}
    table["AntGoal-v0"] = {"robot": "ant"}
    table["HumanoidGoal-v0"] = {"robot": "humanoid"}
    table["ArmPushEasy-v0"] = {"robot": "arm", "table": "push_easy"}
    table["ArmPushHard-v0"] = {"robot": "arm", "table": "push_hard"}
    table["ArmBinpickHard-v0"] = {"robot": "arm", "table": "binpick_hard"}
    return table


ENV_TABLE = _env_table()


def register_envs() -> None:
    """Register all ids with Gymnasium. Calling it again changes nothing."""
    for env_id, kwargs in ENV_TABLE.items():
        if env_id not in registry:
            length = POINT_EPISODE_LENGTH if kwargs["robot"] == "point" else EPISODE_LENGTH
            register(env_id, entry_point=ENTRY_POINT, max_episode_steps=length, kwargs=kwargs)


def import_gymnasium_robotics() -> None:
    """
    Import gymnasium-robotics, which registers its environments, without one of the notices that it prints at each import: that
    on Adroit, whose environments have no goals.
    """
    with contextlib.ExitStack() as stack:
        # Without this package there are no notices
        with contextlib.suppress(ImportError):
            from farama_notifications import notifications

            notices = notifications.get("gymnasium_robotics", {})
            others = {version: text for version, text in notices.items() if not text.startswith("AdroitHand")}
            stack.enter_context(patch.dict(notifications, gymnasium_robotics=others))
        importlib.import_module("gymnasium_robotics")


def find_spec(env_id: str, gym_packages: Iterable[str] = ()) -> EnvSpec:
    """
    Find the environment that an id names. All of this package that takes an id finds it here; ``gym.make`` and all that
    builds on it know the ``id`` of the result afterwards.

    Ids may be those of Gymnasium, of this package, of gymnasium-robotics (which is imported if it is needed) and of any
    package that is named, either by ``gym_packages`` or in the id, as in ``"panda_gym:PandaReach-v3"``.

    :param env_id: The id
    :param gym_packages: Modules that register environments when they are imported
    :return: Its specification; its ``id`` names no module
    :raises gymnasium.error.Error: If there is no such environment, or a module cannot be imported
    """
    *modules, name = env_id.split(":")
    if not all(modules):
        raise gym.error.Error(f"{env_id!r} names no module before the colon")
    for module in (*gym_packages, *modules):
        try:
            importlib.import_module(module)
        except ImportError as error:
            message = f"{env_id!r} cannot be found, as the module {module!r} cannot be imported: {error}"
            raise gym.error.UnregisteredEnv(message) from error
    namespace, base, version = parse_env_id(name)
    if name not in registry and find_highest_version(namespace, base) is None:
        import_gymnasium_robotics()
    if version is None:
        # As `gym.make` does
        name = get_env_id(namespace, base, find_highest_version(namespace, base))
    try:
        return gym.spec(name)
    except gym.error.UnregisteredEnv as error:
        hint = "Name the package that registers it if it is another one's, as in 'panda_gym:PandaReach-v3'"
        raise type(error)(f"{error} {hint}") from None
