import csv
import os
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from sb3_deepcrl.common.utils import check_actions


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
    :param episodes: At least one episode
    :return: Mean of each measure over the episodes, by name
    """
    names = [field.name for field in fields(GoalEpisode) if field.name != "env_index"]
    return {name: float(np.mean([getattr(episode, name) for episode in episodes])) for name in names}


def innermost_envs(env: VecEnv) -> set[int]:
    """
    :param env: Environment
    :return: Identities of what is inside all wrappers: of the vectorised env, and of its envs where they are in this process
    """
    base = env.unwrapped
    envs = [single.unwrapped for single in base.envs] if isinstance(base, DummyVecEnv) else []
    return {id(each) for each in (base, *envs)}


class GoalEpisodeRecorder:
    """
    Callback for :func:`~stable_baselines3.common.evaluation.evaluate_policy` that records one :class:`GoalEpisode` for
    each episode. Success is read from ``info["is_success"]``, or from ``info["success"]`` where there is no such key.

    :param env: The environment that is evaluated
    """

    def __init__(self, env: VecEnv):
        self.env = env
        self.vec_normalize = unwrap_vec_normalize(env)
        self.episodes: list[GoalEpisode] = []
        self._successes: list[list[bool]] = [[] for _ in range(env.num_envs)]
        self._distances: list[list[float]] = [[] for _ in range(env.num_envs)]
        self._rewards: list[float] = [0.0] * env.num_envs

    @staticmethod
    def _distance(achieved_goal: Any, desired_goal: Any) -> float:
        achieved, desired = (np.asarray(goal, dtype=np.float64) for goal in (achieved_goal, desired_goal))
        return float(np.linalg.norm(achieved - desired))

    def __call__(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """
        :param locals_: Local variables of ``evaluate_policy``
        :param globals_: Its global variables
        :raises ValueError: if the info dict tells nothing about success, or if the action is NaN or infinite
        """
        index, info, done = locals_["i"], locals_["info"], bool(locals_["done"])
        check_actions(locals_["actions"][index], locals_["observations"], locals_["model"])
        success = info.get("is_success", info.get("success"))
        if success is None:
            raise ValueError(
                "The info dict of the evaluation env has neither `is_success` nor `success`, "
                f"only {sorted(info)}: wrap the env so that `step` reports one of them"
            )
        successes, distances = self._successes[index], self._distances[index]
        successes.append(bool(success))
        # The goal that was pursued in this step: the next one may be another
        goal = locals_["observations"]["desired_goal"][index]
        last = info.get("terminal_observation")
        if done and last is None:
            # A simulator that does not tell how the episode ended: do without it
            distances = distances or [np.nan]
        elif self.vec_normalize is None:
            achieved = last["achieved_goal"] if done else locals_["new_observations"]["achieved_goal"][index]
            distances.append(self._distance(achieved, goal))
        elif not done:
            # What VecNormalize gave may be clipped
            original = self.vec_normalize.get_original_obs()
            distances.append(self._distance(original["achieved_goal"][index], original["desired_goal"][index]))
        elif not distances:
            # Of the last observation there is only the normalised one: do without it unless it is all there is
            original = self.vec_normalize.unnormalize_obs(last)
            distances.append(self._distance(original["achieved_goal"], original["desired_goal"]))
        self._rewards[index] += float(locals_["reward"])
        if done:
            self.episodes.append(
                GoalEpisode(
                    env_index=index,
                    episode_reward=float(info["episode"]["r"]) if "episode" in info else self._rewards[index],
                    episode_length=len(successes),
                    success_any=any(successes),
                    success_last=successes[-1],
                    time_at_goal=sum(successes),
                    time_at_goal_fraction=float(np.mean(successes)),
                    mean_distance=float(np.mean(distances)),
                )
            )
            self._successes[index], self._distances[index], self._rewards[index] = [], [], 0.0


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
    :param env: Goal-conditioned environment, vectorised or not
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


class GoalEvalCallback(EvalCallback):
    """
    Callback for evaluating a goal-conditioned agent: what :class:`~stable_baselines3.common.callbacks.EvalCallback` does,
    and the measures of :class:`GoalEpisode`, logged as ``eval/success_any``, ``eval/success_last``,
    ``eval/time_at_goal`` (steps), ``eval/time_at_goal_fraction`` and ``eval/mean_distance``. ``eval/success_rate``, and
    ``successes`` in ``evaluations.npz``, are Stable-Baselines3's names of the success at the last step.

    If there is a ``log_path``, each episode becomes a row of ``episodes.csv`` in that folder.

    :param eval_env: The environment used for evaluation
    :param callback_on_new_best: Callback to trigger when there is a new best model according to the ``mean_reward``
    :param callback_after_eval: Callback to trigger after every evaluation
    :param n_eval_episodes: The number of episodes to test the agent
    :param eval_freq: Evaluate the agent every ``eval_freq`` call of the callback
    :param log_path: Path to a folder for ``evaluations.npz`` and ``episodes.csv``
    :param best_model_save_path: Path to a folder where the best model will be saved
    :param deterministic: Whether the evaluation should use stochastic or deterministic actions
    :param render: Whether to render the environment during evaluation
    :param verbose: Verbosity level: 0 for no output, 1 for the results
    :param warn: Whether to warn if the env has no ``Monitor`` wrapper
    """

    def __init__(
        self,
        eval_env: gym.Env | VecEnv,
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        n_eval_episodes: int = 5,
        eval_freq: int = 10000,
        log_path: str | None = None,
        best_model_save_path: str | None = None,
        deterministic: bool = True,
        render: bool = False,
        verbose: int = 1,
        warn: bool = True,
    ):
        super().__init__(
            eval_env,
            callback_on_new_best,
            callback_after_eval,
            n_eval_episodes,
            eval_freq,
            log_path,
            best_model_save_path,
            deterministic,
            render,
            verbose,
            warn,
        )
        self.episodes_path = None if log_path is None else os.path.join(log_path, "episodes.csv")
        self._has_rows = False
        self.last_means: dict[str, float] = {}
        self._recorder = GoalEpisodeRecorder(self.eval_env)

    def continue_episodes(self, path: str | os.PathLike[str], num_timesteps: int) -> None:
        """
        Let ``episodes.csv`` start with the rows of a run that this one continues.

        :param path: The file of that run; nothing is done if there is none, or if it is of another version
        :param num_timesteps: Number of env steps from which the run is continued: later rows are left out
        """
        if self.episodes_path is None or not os.path.isfile(path):
            return
        header = ["timesteps", *(field.name for field in fields(GoalEpisode))]
        with open(path) as file:
            # The last line may not have been written to its end
            first, *lines = file.read().split("\n")[:-1] or [""]
        if first.split(",") != header:
            return
        rows = [row for row in csv.reader(lines) if int(row[0]) <= num_timesteps]
        with open(self.episodes_path, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        self._has_rows = True

    def _init_callback(self) -> None:
        if innermost_envs(self.training_env) & innermost_envs(self.eval_env):
            raise ValueError(
                "`eval_env` is the env that the model is trained in: to evaluate would end the episode that is running there. "
                "Make another one"
            )
        super()._init_callback()

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True
        # An evaluation that was interrupted leaves nothing behind
        self._recorder = GoalEpisodeRecorder(self.eval_env)
        best_mean_reward, verbose = self.best_mean_reward, self.verbose
        # The parent prints success at the last step as "Success rate"
        self.verbose = 0
        try:
            continue_training = super()._on_step()
        finally:
            self.verbose = verbose
        if verbose >= 1:
            means = self.last_means
            print(
                f"Eval num_timesteps={self.num_timesteps}: success {100 * means['success_any']:.0f} % at any step, "
                f"{100 * means['success_last']:.0f} % at the last step, time at goal {means['time_at_goal']:.1f} of "
                f"{means['episode_length']:.0f} steps, episode reward {means['episode_reward']:.2f}"
                + (" (new best)" if self.best_mean_reward > best_mean_reward else "")
            )
        return continue_training

    def _log_success_callback(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        self._recorder(locals_, globals_)
        if locals_["done"]:
            # The parent reads `is_success` only
            self._is_success_buffer.append(self._recorder.episodes[-1].success_last)
        # The parent dumps the logger before it gives the control back
        if len(self._recorder.episodes) == self.n_eval_episodes:
            self._log_episodes(self._recorder.episodes)

    def _log_episodes(self, episodes: list[GoalEpisode]) -> None:
        self.last_means = mean_of_episodes(episodes)
        for name in ("success_any", "success_last", "time_at_goal", "time_at_goal_fraction", "mean_distance"):
            self.logger.record(f"eval/{name}", self.last_means[name])
        if self.episodes_path is None:
            return
        # Like evaluations.npz, the file belongs to this callback
        with open(self.episodes_path, "a" if self._has_rows else "w", newline="") as file:
            writer = csv.writer(file)
            if not self._has_rows:
                self._has_rows = True
                writer.writerow(["timesteps", *asdict(episodes[0])])
            writer.writerows([self.num_timesteps, *astuple(episode)] for episode in episodes)
