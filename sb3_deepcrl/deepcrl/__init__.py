from sb3_deepcrl.deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.deepcrl.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "DeepCRL", "MlpPolicy", "MultiInputPolicy"]
