"""Train a point in a maze, evaluate it on the way, save it: python train.py [STEPS]"""

import sys

from sb3_deepcrl import DeepCRL, GoalEvalCallback
from sb3_deepcrl.envs import BatchVecEnv

n_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000

# 16 envs that are stepped in one native call; of another package, `make_vec_env("PointMaze_UMaze-v3", n_envs=16)`
env = BatchVecEnv("PointUMaze-v0", n_envs=16)
# From the start cell to the far goals
eval_env = BatchVecEnv("PointUMazeEval-v0", n_envs=16)

model = DeepCRL("MultiInputPolicy", env, depth=8, width=64, batch_size=256, learning_rate=6e-4, gamma=0.95)
callback = GoalEvalCallback(eval_env, eval_freq=n_steps // 16 // 4, n_eval_episodes=16, log_path="point_umaze")
model.learn(n_steps, callback=callback)

model.save("point_umaze/model")
model.save_replay_buffer("point_umaze/replay_buffer")
