"""
Episodes to look at, the same for all models.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import VecEnv

from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs import BatchVecEnv, SuccessInfoWrapper
from sb3_deepcrl.envs.arguments import checked_env_kwargs
from sb3_deepcrl.envs.registration import ENV_TABLE

EVAL_SEED = 10_000


def make_envs(env_id: str, n_envs: int, env_kwargs: Mapping[str, Any] | None = None, seed: int = EVAL_SEED) -> VecEnv:
    """Make parallel envs that report ``is_success``, natively stepped if they are of this package."""
    kwargs = dict(env_kwargs or {})
    spec = find_spec(env_id)
    with checked_env_kwargs(spec, kwargs):
        if spec.id not in ENV_TABLE:
            return make_vec_env(spec.id, n_envs, seed=seed, wrapper_class=SuccessInfoWrapper, env_kwargs=kwargs)
        env = BatchVecEnv(spec.id, n_envs, n_threads=th.get_num_threads(), **kwargs)
        env.seed(seed)
        return env


def make_env(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> gym.Env:
    """Make a single env."""
    spec = find_spec(env_id)
    with checked_env_kwargs(spec, env_kwargs or {}):
        return gym.make(spec.id, **(env_kwargs or {}))


class Episode(NamedTuple):
    """What happened in an episode: observations ``(n_steps + 1, ...)``, actions and infos of each step."""

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    infos: list[dict[str, Any]]

    @property
    def positions(self) -> np.ndarray:
        """Achieved goals, shape ``(n_steps + 1, goal_dim)``."""
        return self.observations["achieved_goal"]

    @property
    def goals(self) -> np.ndarray:
        """Desired goals, same shape."""
        return self.observations["desired_goal"]

    @property
    def successes(self) -> np.ndarray:
        """Whether the goal was reached after each step, shape ``(n_steps,)``."""
        return np.array([info["is_success"] for info in self.infos], dtype=bool)

    def head(self, n_steps: int) -> "Episode":
        """The first steps of the episode."""
        observations = {key: values[: n_steps + 1] for key, values in self.observations.items()}
        return Episode(observations, self.actions[:n_steps], self.infos[:n_steps])


def record_episodes(model: PolicyPredictor, env: VecEnv) -> list[Episode]:
    """Play the first episode of each env, with deterministic actions."""
    episodes: dict[int, Episode] = {}
    frames: list[dict[str, np.ndarray]] = []
    actions: list[np.ndarray] = []
    infos: list[list[dict[str, Any]]] = []
    obs: Any = env.reset()
    while len(episodes) < env.num_envs:
        # The env may write the next ones into the same arrays
        frames.append({key: value.copy() for key, value in obs.items()})
        action, _ = model.predict(obs, deterministic=True)
        obs, _, dones, step_infos = env.step(action)
        actions.append(action)
        infos.append([dict(info) for info in step_infos])
        for i in set(np.flatnonzero(dones).tolist()) - set(episodes):
            last = infos[-1][i]["terminal_observation"]
            episodes[i] = Episode(
                {key: np.stack([*(frame[key][i] for frame in frames), last[key]]) for key in last},
                np.stack([action[i] for action in actions]),
                [step[i] for step in infos],
            )
    return [episodes[i] for i in range(env.num_envs)]


def play_episodes(
    model: PolicyPredictor, env_id: str, n_episodes: int, env_kwargs: Mapping[str, Any] | None = None, seed: int = EVAL_SEED
) -> list[Episode]:
    """Play episodes with deterministic actions, the same starts and goals for all models."""
    with contextlib.closing(make_envs(env_id, n_episodes, env_kwargs, seed)) as env:
        return record_episodes(model, env)
