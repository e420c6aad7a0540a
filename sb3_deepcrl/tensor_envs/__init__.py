"""
Goal-reaching tasks whose observations are tensors on a device: those of this package on MuJoCo Warp, and those of other
batched simulators.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_deepcrl.tensor_envs.goal_adapter import GoalAdapter
    from sb3_deepcrl.tensor_envs.warp_vec_env import WarpVecEnv

__all__ = ["GoalAdapter", "WarpVecEnv"]

_MODULES = {"GoalAdapter": "goal_adapter", "WarpVecEnv": "warp_vec_env"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The adapter needs no MuJoCo
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
