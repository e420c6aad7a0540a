"""Export the policy that train.py has saved, and let it act through onnxruntime alone: python export.py"""

import gymnasium as gym
import onnxruntime

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.deploy import export_policy

path = export_policy(DeepCRL.load("point_umaze/model"), "point_umaze/policy.onnx")

# From here on neither PyTorch nor Stable-Baselines3 is needed
session = onnxruntime.InferenceSession(path)
env = gym.make("PointUMazeEval-v0")
obs, info = env.reset(seed=0)
for step in range(150):
    (actions,) = session.run(["action"], {key: value[None] for key, value in obs.items()})
    obs, reward, terminated, truncated, info = env.step(actions[0])
    if info["is_success"]:
        print(f"At the goal after {step + 1} steps")
        break
