from sb3_deepcrl.deep_policies.policies import DeepResidualExtractor, register_policies, unregister_policies

__all__ = ["DeepResidualExtractor", "register_policies", "unregister_policies"]
