"""
The Gymnasium ids of this package. This module imports nothing but Gymnasium: the simulator is loaded by ``gym.make``.

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
``BitFlipping-v0``                           Stable-Baselines3's 15 bits, which discrete actions flip until all are ones
============================================ ===============================================================================

The names have no slash and no colon, so RL Zoo can use them as folder names and as keys of its config files.
"""

from typing import Any

from gymnasium.envs.registration import register, registry

ENTRY_POINT = "sb3_deepcrl.envs.goal_env:GoalEnv"
# Steps of an episode in the paper (appendix B)
EPISODE_LENGTH = 1000
# The point is fast: crossing the largest maze takes it about 100 steps
POINT_EPISODE_LENGTH = 150


def _env_table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for robot in ("point", "ant", "humanoid"):
        for layout in ("u", "u2", "u3", "u4", "u5", "u6", "u7", "big", "hardest"):
            name = f"{robot.capitalize()}{layout.capitalize()}Maze"
            table[f"{name}-v0"] = {"robot": robot, "maze": layout}
            if robot == "point":
                # A point that knows how to reach near goals is too precise to find the far ones by chance
                table[f"{name}-v0"].update(random_start=True, goal="continuing")
            # Hardest has no evaluation goals of its own, but the point has another start there
            if layout != "hardest" or robot == "point":
                table[f"{name}Eval-v0"] = {"robot": robot, "maze": layout, "goal_set": "eval"}
        stitching = {"robot": robot, "maze": "u", "stitching": 3}
        table[f"{robot.capitalize()}UMazeStitch-v0"] = stitching
        table[f"{robot.capitalize()}UMazeStitchEval-v0"] = {**stitching, "goal_set": "eval"}
    arm = {"ArmPushEasy-v0": "push_easy", "ArmPushHard-v0": "push_hard", "ArmBinpickHard-v0": "binpick_hard"}
    table |= {"AntGoal-v0": {"robot": "ant"}, "HumanoidGoal-v0": {"robot": "humanoid"}}
    return table | {env_id: {"robot": "arm", "table": name} for env_id, name in arm.items()}


#: Arguments of the task by Gymnasium id
ENV_TABLE = _env_table()


def register_envs() -> None:
    """Register all ids with Gymnasium. Calling it again changes nothing."""
    for env_id, kwargs in ENV_TABLE.items():
        if env_id not in registry:
            length = POINT_EPISODE_LENGTH if kwargs["robot"] == "point" else EPISODE_LENGTH
            register(env_id, entry_point=ENTRY_POINT, max_episode_steps=length, kwargs=kwargs)
    if "BitFlipping-v0" not in registry:
        register("BitFlipping-v0", entry_point="stable_baselines3.common.envs:BitFlippingEnv", kwargs={"n_bits": 15})
