"""
Train a policy, export it, and let it act through onnxruntime alone.
"""

import gymnasium as gym
import numpy as np
import onnxruntime

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.deploy import export_policy

model = DeepCRL("MultiInputPolicy", "PointUMaze-v0", depth=8, width=64, verbose=1)
model.learn(20_000)
path = export_policy(model, "policy.onnx")

# From here on neither PyTorch nor Stable-Baselines3 is needed
session = onnxruntime.InferenceSession(path)
env = gym.make("PointUMaze-v0")
obs, _ = env.reset(seed=0)
for _ in range(150):
    (actions,) = session.run(["action"], {key: np.asarray(value)[None] for key, value in obs.items()})
    obs, _, terminated, truncated, info = env.step(actions[0])
    if info["is_success"] or terminated or truncated:
        break
print(f"Reached the goal: {bool(info['is_success'])}")
