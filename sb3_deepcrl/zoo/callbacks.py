from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from gymnasium import spaces
from rl_zoo3.callbacks import TrialEvalCallback
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_deepcrl.common.callbacks import GoalEvalCallback
from sb3_deepcrl.common.distributed import Ranks
from sb3_deepcrl.common.utils import atomic_path
from sb3_deepcrl.zoo.runs import RunFolder


def reports_goals(env: VecEnv) -> bool:
    """Whether an env tells of its goals and if they are reached. It is reset and makes a step, so nobody may use it yet."""
    space = env.observation_space
    if not isinstance(space, spaces.Dict) or not {"achieved_goal", "desired_goal"} <= set(space.spaces):
        return False
    env.reset()
    _, _, _, infos = env.step(np.array([env.action_space.sample() for _ in range(env.num_envs)]))
    return all("is_success" in info or "success" in info for info in infos)


class TrialGoalEvalCallback(TrialEvalCallback, GoalEvalCallback):
    """Callback used for evaluating and reporting a trial by the fraction of the steps that are spent at the goal."""

    #: What RL Zoo reports to Optuna, in place of the reward
    last_mean_reward = property(lambda self: self.last_means.get("time_at_goal_fraction", -np.inf), lambda self, value: None)


def make_trial_callback(eval_env: VecEnv, trial: optuna.Trial, **kwargs: Any) -> EvalCallback:
    """Make the callback that reports a trial by time at goal where the env tells it, and by reward elsewhere."""
    callback_class = TrialGoalEvalCallback if reports_goals(eval_env) else TrialEvalCallback
    return callback_class(eval_env, trial, **kwargs)


def save_model(model: BaseAlgorithm, path: Path, save_replay_buffer: bool) -> None:
    """
    Save a model with all that belongs to it in the folder of its run. Each file appears as a whole or not at all, and the
    model last: if there is one, it has everything.
    """

    def write(path: Path, save: Callable[[str], None]) -> None:
        with atomic_path(path, path.suffix) as temporary:
            save(str(temporary))

    if Ranks().rank > 0:
        # Rank 0 writes, the others give it their transitions
        if save_replay_buffer:
            model.save_replay_buffer(path)  # type: ignore[attr-defined]
        return
    run = RunFolder(path.parent)
    if save_replay_buffer and getattr(model, "replay_buffer", None) is not None:
        write(run.sibling(path, "replay_buffer"), model.save_replay_buffer)  # type: ignore[attr-defined]
    if (vec_normalize := model.get_vec_normalize_env()) is not None:
        write(run.sibling(path, "vecnormalize"), vec_normalize.save)
    write(path, model.save)
    for buffer in (run.path / "replay_buffer.pkl", *run.path.glob("rl_model_replay_buffer_*_steps.pkl")):
        # One is enough to go on
        if save_replay_buffer and buffer != run.sibling(path, "replay_buffer"):
            buffer.unlink(missing_ok=True)


class ResumableCheckpointCallback(CheckpointCallback):
    """
    Callback for saving checkpoints a run can be continued from, whenever it is killed. The newest one has its replay buffer.
    Its arguments are those of ``CheckpointCallback``.
    """

    def _on_step(self) -> bool:
        if self.n_calls % self.save_freq == 0:
            path = Path(self.save_path) / f"rl_model_{self.num_timesteps}_steps.zip"
            save_model(self.model, path, self.save_replay_buffer)
        return True
