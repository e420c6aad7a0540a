"""
Goal-reaching tasks in MuJoCo, as Gymnasium environments and in native batches for Stable-Baselines3.

Importing this package loads neither the simulator nor Stable-Baselines3; the first use of a name below does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sb3_deepcrl.envs.registration import register_envs

if TYPE_CHECKING:
    from sb3_deepcrl.envs.batch_vec_env import BatchVecEnv
    from sb3_deepcrl.envs.goal_env import GoalEnv
    from sb3_deepcrl.envs.ogbench_adapter import OGBenchGoalWrapper
    from sb3_deepcrl.envs.plotting import plot_maze
    from sb3_deepcrl.envs.wrappers import SingleGoalWrapper, SuccessInfoWrapper

__all__ = [
    "BatchVecEnv",
    "GoalEnv",
    "OGBenchGoalWrapper",
    "SingleGoalWrapper",
    "SuccessInfoWrapper",
    "plot_maze",
    "register_envs",
]

_MODULES = {
    "BatchVecEnv": "batch_vec_env",
    "GoalEnv": "goal_env",
    "OGBenchGoalWrapper": "ogbench_adapter",
    "SingleGoalWrapper": "wrappers",
    "SuccessInfoWrapper": "wrappers",
    "plot_maze": "plotting",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
