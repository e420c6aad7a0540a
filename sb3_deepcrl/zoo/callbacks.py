from pathlib import Path
from typing import Any

import numpy as np
import optuna
from gymnasium import spaces
from rl_zoo3.callbacks import TrialEvalCallback
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_deepcrl.common.evaluation import GoalEvalCallback
from sb3_deepcrl.common.utils import atomic_path


def reports_goals(env: VecEnv) -> bool:
    """
    :param env: An env that nobody uses yet: it is reset and makes a step
    :return: Whether its observations hold goals, and its infos tell whether they are reached
    """
    space = env.observation_space
    if not isinstance(space, spaces.Dict) or not {"achieved_goal", "desired_goal"} <= set(space.spaces):
        return False
    env.reset()
    _, _, _, infos = env.step(np.array([env.action_space.sample() for _ in range(env.num_envs)]))
    return all("is_success" in info or "success" in info for info in infos)


class TrialGoalEvalCallback(GoalEvalCallback):
    """
    Callback used for evaluating and reporting a trial by the fraction of the steps that are spent at the goal.

    :param eval_env: The environment used for evaluation
    :param trial: The trial
    :param kwargs: Other arguments of :class:`~sb3_deepcrl.common.evaluation.GoalEvalCallback`
    """

    def __init__(self, eval_env: VecEnv, trial: optuna.Trial, **kwargs: Any):
        super().__init__(eval_env, verbose=0, **kwargs)
        self.trial = trial
        self.eval_idx = 0
        self.is_pruned = False

    def _on_step(self) -> bool:
        if not super()._on_step():
            return False
        if self.eval_freq > 0 and self.n_calls % self.eval_freq == 0:
            self.eval_idx += 1
            # What the study takes as the result of the trial
            self.last_mean_reward = self.last_means["time_at_goal_fraction"]
            self.trial.report(self.last_mean_reward, self.eval_idx)
            # Prune trial if need
            self.is_pruned = self.trial.should_prune()
        return not self.is_pruned


def make_trial_callback(eval_env: VecEnv, trial: optuna.Trial, **kwargs: Any) -> EvalCallback:
    """
    :param eval_env: The environment used for evaluation
    :param trial: The trial
    :param kwargs: Other arguments of the callback
    :return: A callback that reports time at goal where the env tells it, and the reward elsewhere
    """
    callback_class = TrialGoalEvalCallback if reports_goals(eval_env) else TrialEvalCallback
    return callback_class(eval_env, trial, **kwargs)


class ResumableCheckpointCallback(CheckpointCallback):
    """
    Callback for saving checkpoints a run can be continued from, whenever it is killed.

    Each file appears as a whole or not at all, and the model last: a model of which there is a file has all that belongs to
    it. Only the newest checkpoint keeps its replay buffer, and the previous one loses it when the newest is complete.

    :param save_freq: Save checkpoints every ``save_freq`` call of the callback.
    :param save_path: Path to the folder where the model will be saved.
    :param save_replay_buffer: Save the model replay buffer
    :param verbose: Verbosity level: 0 for no output, 2 for indicating when saving model checkpoint
    """

    def __init__(self, save_freq: int, save_path: str, save_replay_buffer: bool = False, verbose: int = 0):
        super().__init__(save_freq, save_path, "rl_model", save_replay_buffer, save_vecnormalize=True, verbose=verbose)

    def _on_step(self) -> bool:
        if self.n_calls % self.save_freq != 0:
            return True
        previous_buffers = replay_buffers(Path(self.save_path))
        buffer_path = Path(self._checkpoint_path("replay_buffer_", extension="pkl"))
        if self.save_replay_buffer:
            self.model.save_replay_buffer(buffer_path)  # type: ignore[attr-defined]
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is not None:
            with atomic_path(self._checkpoint_path("vecnormalize_", extension="pkl"), ".pkl") as temporary:
                vec_normalize.save(str(temporary))
        model_path = self._checkpoint_path(extension="zip")
        self.model.save(model_path)
        if self.verbose >= 2:
            print(f"Saving model checkpoint to {model_path}")
        for previous in previous_buffers:
            if previous != buffer_path:
                previous.unlink(missing_ok=True)
        return True


def replay_buffers(folder: Path) -> list[Path]:
    """
    :param folder: Folder of a run
    :return: Replay buffers of its checkpoints
    """
    return list(folder.glob("rl_model_replay_buffer_*_steps.pkl"))
