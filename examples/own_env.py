"""A goal-conditioned env from scratch, a puck on ice that is pushed to a place, and DeepCRL on it: own_env.py [STEPS]"""

import sys

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env

from sb3_deepcrl import DeepCRL, evaluate_goals, mean_of_episodes

n_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000


class Puck(gym.Env):
    """It slides: an action is an acceleration. There is nothing to compute but where it is."""

    def __init__(self):
        place = spaces.Box(-1.0, 1.0, (2,), np.float32)
        # What is achieved and what is desired are of one space. `observation` is the rest of the state
        velocity = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = spaces.Dict(observation=velocity, achieved_goal=place, desired_goal=place)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.goal = self.np_random.uniform(-1.0, 1.0, (2, 2)).astype(np.float32)
        self.velocity = np.zeros(2, np.float32)
        return self._observe(), {}

    def step(self, action):
        self.velocity = 0.95 * self.velocity + 0.02 * action.astype(np.float32)
        place = self.place + self.velocity
        self.place = np.clip(place, -1.0, 1.0)
        # It stops at the border
        self.velocity[self.place != place] = 0.0
        is_success = bool(np.linalg.norm(self.place - self.goal) < 0.1)
        # DeepCRL does not look at the reward. `is_success` is what evaluations count
        return self._observe(), float(is_success), False, False, {"is_success": is_success}

    def _observe(self):
        return {"observation": self.velocity.copy(), "achieved_goal": self.place.copy(), "desired_goal": self.goal.copy()}


check_env(Puck())
gym.register("Puck-v0", entry_point=Puck, max_episode_steps=100)
env, eval_env = (make_vec_env(lambda: gym.make("Puck-v0"), n_envs=8) for _ in range(2))

model = DeepCRL("MultiInputPolicy", env, depth=8, width=64, batch_size=256, learning_rate=6e-4, gamma=0.95)
model.learn(n_steps)
print(mean_of_episodes(evaluate_goals(model, eval_env, n_eval_episodes=32)))
