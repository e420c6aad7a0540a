"""Draw the value that the model of train.py has learned over its maze, for one goal: python value_map.py"""

import gymnasium as gym

from sb3_deepcrl import DeepCRL
from sb3_deepcrl.analysis import plot_value_map

model = DeepCRL.load("point_umaze/model")
# The goal of the first evaluation episode. Another one is `goal=(x, y)`, in meters
ax = plot_value_map(model, gym.make("PointUMazeEval-v0"), seed=0)
ax.figure.savefig("point_umaze/value.png")
