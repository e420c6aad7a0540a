"""
What policies of different depths are worth and cost.
"""

import time
from collections.abc import Mapping

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_deepcrl.common.evaluation import evaluate_goals, mean_of_episodes
from sb3_deepcrl.common.torch_layers import residual_towers
from sb3_deepcrl.common.utils import LAYERS_PER_BLOCK
from sb3_deepcrl.deepcrl import DeepCRL

# Seconds for which the time of a call is measured
SECONDS_OF_CALLS = 0.3


def compare_policies(
    models: Mapping[str, DeepCRL], env: gym.Env | VecEnv, n_eval_episodes: int = 64, seed: int = 0
) -> list[dict[str, str | float]]:
    """
    Evaluate models on the same starts and goals, and measure what acting costs.

    :param models: Models by name
    :param env: Env for all of them
    :param n_eval_episodes: Number of episodes of each
    :param seed: Seed of the env
    :return: A row for each model: its name, depth and width, ``success`` (fraction of the episodes that reach the goal at any
        step), ``time_at_goal`` (steps), ``ms_per_call`` of ``predict`` with one observation, median, and ``parameters`` of the
        actor
    :raises ValueError: if a model is no DeepCRL
    """
    for name, model in models.items():
        if not isinstance(model, DeepCRL):
            raise ValueError(f"The model {name!r} is a {type(model).__name__}: only those of DeepCRL can be compared")
    vec_env = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    rows: list[dict[str, str | float]] = []
    for name, model in models.items():
        vec_env.seed(seed)
        means = mean_of_episodes(evaluate_goals(model, vec_env, n_eval_episodes))
        obs = vec_env.reset()
        assert isinstance(obs, dict)
        one = {key: values[:1] for key, values in obs.items()}
        seconds: list[float] = []
        while sum(seconds) < SECONDS_OF_CALLS:
            start = time.perf_counter()
            model.predict(one, deterministic=True)
            seconds.append(time.perf_counter() - start)
        tower = residual_towers(model.actor)[0]
        rows.append(
            {
                "model": name,
                "depth": LAYERS_PER_BLOCK * len(tower.blocks),
                "width": tower.output_dim,
                "success": means["success_any"],
                "time_at_goal": means["time_at_goal"],
                "ms_per_call": 1000 * float(np.median(seconds)),
                "parameters": sum(parameter.numel() for parameter in model.actor.parameters()),
            }
        )
    return rows
