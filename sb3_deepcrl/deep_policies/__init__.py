from sb3_deepcrl.deep_policies.policies import DeepResidualExtractor
from sb3_deepcrl.deep_policies.registry import register_policies, unregister_policies

__all__ = ["DeepResidualExtractor", "register_policies", "unregister_policies"]
