from sb3_deepcrl.envs.wrappers import SuccessInfoWrapper

__all__ = ["SuccessInfoWrapper"]
