from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from sb3_deepcrl.common.tensor_env import TensorVecEnv


@dataclass
class GoalEpisode:
    """
    What happened in one evaluation episode.

    :param env_index: Which env played it
    :param episode_reward: Sum of rewards
    :param episode_length: Number of steps
    :param success_any: Whether the goal was reached at any step
    :param success_last: Whether the goal was reached at the last step
    :param time_at_goal: Number of steps at the goal (the paper's measure, section 4.1)
    :param time_at_goal_fraction: The same divided by the episode length
    :param mean_distance: Euclidean distance between achieved and desired goal, averaged over the steps, in their units
        (with ``VecNormalize``, or without ``terminal_observation`` in the info dict, over all steps but the last one)
    """

    env_index: int
    episode_reward: float
    episode_length: int
    success_any: bool
    success_last: bool
    time_at_goal: int
    time_at_goal_fraction: float
    mean_distance: float


def mean_of_episodes(episodes: list[GoalEpisode]) -> dict[str, float]:
    """
    Mean of each measure over episodes.

    :param episodes: At least one episode
    :return: The means by name
    """
    names = [field.name for field in fields(GoalEpisode) if field.name != "env_index"]
    return {name: float(np.mean([getattr(episode, name) for episode in episodes])) for name in names}


def _distance(achieved_goal: Any, desired_goal: Any) -> float:
    return float(np.linalg.norm(np.asarray(achieved_goal, dtype=np.float64) - np.asarray(desired_goal, dtype=np.float64)))


class GoalEpisodeRecorder:
    """
    Callback for :func:`~stable_baselines3.common.evaluation.evaluate_policy` that records one :class:`GoalEpisode` for
    each episode. Success is read from ``info["is_success"]``, or from ``info["success"]`` where there is no such key.

    :param env: The environment that is evaluated
    :raises ValueError: if its observations have no goal
    """

    def __init__(self, env: VecEnv):
        space = env.observation_space
        if not isinstance(space, spaces.Dict) or "desired_goal" not in space.spaces:
            raise ValueError(
                f"The evaluation env has no `desired_goal` but {space}: use `ResumableEvalCallback` or `EvalCallback` instead"
            )
        self.vec_normalize = unwrap_vec_normalize(env)
        # Their infos are empty within an episode
        self.is_told_at_end = isinstance(env.unwrapped, TensorVecEnv)
        self.episodes: list[GoalEpisode] = []
        # Successes, distances and rewards of the running episode of each env
        self._running: list[tuple[list[bool], list[float], list[float]]] = [([], [], []) for _ in range(env.num_envs)]

    def __call__(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """
        Record a step of one env, by the local variables of ``evaluate_policy``.

        :raises ValueError: if the info dict tells nothing about success, or if the action is NaN or infinite
        """
        index, info, done = locals_["i"], locals_["info"], bool(locals_["done"])
        if not np.isfinite(action := locals_["actions"][index]).all():
            raise ValueError(f"The policy gives actions that are NaN or infinite, {action}: check its weights and the env")
        success = info.get("is_success", info.get("success"))
        if success is None and (done or not self.is_told_at_end):
            raise ValueError(
                "The info dict of the evaluation env has neither `is_success` nor `success`, "
                f"only {sorted(info)}: wrap the env so that `step` reports one of them"
            )
        successes, distances, rewards = self._running[index]
        successes.append(bool(success))
        rewards.append(float(locals_["reward"]))
        # The goal that was pursued in this step: the next one may be another
        goal = locals_["observations"]["desired_goal"][index]
        last = info.get("terminal_observation")
        if done and last is None:
            # A simulator that does not tell how the episode ended: do without it
            distances = distances or [np.nan]
        elif self.vec_normalize is None:
            achieved = last["achieved_goal"] if done else locals_["new_observations"]["achieved_goal"][index]
            distances.append(_distance(achieved, goal))
        elif not done:
            # What VecNormalize gave may be clipped
            original = self.vec_normalize.get_original_obs()
            distances.append(_distance(original["achieved_goal"][index], original["desired_goal"][index]))
        elif not distances:
            # Of the last observation there is only the normalized one: do without it unless it is all there is
            original = self.vec_normalize.unnormalize_obs(last)
            distances.append(_distance(original["achieved_goal"], original["desired_goal"]))
        if done:
            time_at_goal = info["time_at_goal"] if self.is_told_at_end else sum(successes)
            self.episodes.append(
                GoalEpisode(
                    env_index=index,
                    episode_reward=float(info["episode"]["r"]) if "episode" in info else sum(rewards),
                    episode_length=len(successes),
                    success_any=time_at_goal > 0,
                    success_last=successes[-1],
                    time_at_goal=time_at_goal,
                    time_at_goal_fraction=time_at_goal / len(successes),
                    mean_distance=float(np.mean(distances)),
                )
            )
            self._running[index] = [], [], []


def evaluate_goals(
    model: PolicyPredictor,
    env: gym.Env | VecEnv,
    n_eval_episodes: int = 10,
    deterministic: bool = True,
) -> list[GoalEpisode]:
    """
    Run the policy and record how well it reaches its goals. The episodes are divided evenly between the envs,
    as :func:`~stable_baselines3.common.evaluation.evaluate_policy` does.

    :param model: Anything that has ``predict``
    :param env: Goal-conditioned environment, vectorized or not
    :param n_eval_episodes: Number of episodes
    :param deterministic: Whether to use deterministic or stochastic actions
    :return: One row for each episode
    :raises ValueError: if the number of episodes is not positive, if the env does not report success,
        or if an action is NaN or infinite
    """
    if n_eval_episodes < 1:
        raise ValueError(f"`n_eval_episodes` must be at least 1, got {n_eval_episodes}")
    vec_env = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    recorder = GoalEpisodeRecorder(vec_env)
    evaluate_policy(model, vec_env, n_eval_episodes, deterministic, callback=recorder, warn=False)
    return recorder.episodes
