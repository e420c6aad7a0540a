"""Load what train.py has saved, without an env to act, with one to train on: python load_and_continue.py [STEPS]"""

import sys

import gymnasium as gym

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.envs import BatchVecEnv

n_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000

model = DeepCRL.load("point_umaze/model")

env = gym.make("PointUMazeEval-v0")
obs, info = env.reset(seed=0)
for step in range(150):
    action, _ = model.predict(obs, deterministic=True)
    obs, reward, terminated, truncated, info = env.step(action)
    if info["is_success"]:
        print(f"At the goal after {step + 1} steps")
        break

model.set_env(BatchVecEnv("PointUMaze-v0", n_envs=16))
model.load_replay_buffer("point_umaze/replay_buffer")
model.learn(n_steps, reset_num_timesteps=False)
model.save("point_umaze/model")
