"""
Goal-reaching tasks whose observations are tensors on a device: those of this package on MuJoCo Warp, and those of other
batched simulators.
"""

from sb3_deepcrl.tensor_envs.goal_adapter import GoalAdapter
from sb3_deepcrl.tensor_envs.warp_vec_env import WarpVecEnv

__all__ = ["GoalAdapter", "WarpVecEnv"]
