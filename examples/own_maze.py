"""Draw a maze of your own and learn it: python own_maze.py [STEPS]"""

import sys

from sb3_deepcrl import DeepCRL, evaluate_goals, mean_of_episodes
from sb3_deepcrl.envs import BatchVecEnv, plot_maze

n_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000

# r: start, g: goal of training, G: goal of training and evaluation, #: wall, .: free
maze = [
    "#######",
    "#r.g#G#",
    "###.#.#",
    "#g..g.#",
    "#######",
]
env = BatchVecEnv("PointUMaze-v0", n_envs=16, maze=maze)
eval_env = BatchVecEnv("PointUMazeEval-v0", n_envs=16, maze=maze)
plot_maze(eval_env).figure.savefig("own_maze.png", bbox_inches="tight")

model = DeepCRL("MultiInputPolicy", env, depth=8, width=64, batch_size=256, learning_rate=6e-4, gamma=0.95)
model.learn(n_steps)
print(mean_of_episodes(evaluate_goals(model, eval_env, n_eval_episodes=32)))
