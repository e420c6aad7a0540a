import contextlib
import io
import os
import shlex
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from pprint import pprint
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER
from rl_zoo3.utils import ALGOS, SimpleLinearSchedule, get_latest_run_id
from sb3_contrib.common.vec_env import AsyncEval
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_deepcrl.common.callbacks import TrainingDisplay
from sb3_deepcrl.common.evaluation import GoalEvalCallback
from sb3_deepcrl.common.utils import atomic_path, is_for_user, tell, uninterrupted
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.envs import BatchVecEnv
from sb3_deepcrl.envs.arguments import checked_env_kwargs
from sb3_deepcrl.zoo.callbacks import ResumableCheckpointCallback, replay_buffers, reports_goals
from sb3_deepcrl.zoo.checkpoints import CHECKPOINT, read_run_file, run_config, sibling
from sb3_deepcrl.zoo.config import (
    DEEPCRL_SCHEDULES,
    ConfigError,
    argument_names,
    check_config_file,
    check_hyperparams,
    is_missing,
)

# Envs that report `is_success`: these packages, see `sb3_deepcrl.zoo`
SUCCESS_REPORTED_BY = ("sb3_deepcrl.envs", "gymnasium_robotics.envs.maze", "gymnasium_robotics.envs.fetch")


def close_env(env: VecEnv) -> None:
    """
    :param env: An env, whose processes may have ended already by the signal that stops this one
    """
    with contextlib.suppress(EOFError, OSError):
        env.close()


class GoalExperimentManager(ExperimentManager):
    """
    RL Zoo's experiment manager with what goal-conditioned training needs besides: configs of this package, ``BatchVecEnv``,
    evaluation by success and time at goal, and runs that go on where they stopped.

    What is wrong in a config or on the command line ends in a :class:`~sb3_deepcrl.zoo.config.ConfigError`.

    :param args: Arguments of the command line
    :param algo: Name of the algorithm
    :param env_id: Id of the env
    :param positional: Other arguments of RL Zoo's experiment manager
    :param vec_env_type: "dummy", "subproc" or "batch"
    :param config: Config, see :func:`~sb3_deepcrl.zoo.config.find_config`
    :param trial_id: Trial of an Optuna study to take the hyperparameters of
    :param kwargs: Other arguments of RL Zoo's experiment manager
    """

    def __init__(
        self,
        args: Any,
        algo: str,
        env_id: str,
        *positional: Any,
        vec_env_type: str = "dummy",
        config: str | None = None,
        trial_id: int | None = None,
        **kwargs: Any,
    ):
        is_batch = vec_env_type == "batch"
        kwargs.update(
            vec_env_type="dummy" if is_batch else vec_env_type,
            config=config,
            trial_id=trial_id,
        )
        super().__init__(args, algo, env_id, *positional, **kwargs)
        if is_batch:
            self.vec_env_class = BatchVecEnv
        # Whether this process has created the folder of the run
        self.has_folder = False
        # Whether the training was interrupted
        self.is_stopped = False
        # A run of DeepCRL goes on with its own config, where it has one and the user asks for no other
        model_path = Path(self.trained_agent)
        self.resumes = self.continue_training and algo == "deepcrl"
        self.resumed_config = run_config(model_path) if self.resumes and config is None else None

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """
        Read hyperparameters, check and pre-process them, create the environment and possibly the model.

        :return: the initialized RL model, None for a hyperparameter search
        :raises ConfigError: if something that the user gave cannot be used. The folder of the run is removed then.
        """
        try:
            return super().setup_experiment()
        except BaseException as error:
            if self.has_folder:
                shutil.rmtree(self.save_path, ignore_errors=True)
            if is_for_user(error) and not isinstance(error, ConfigError):
                raise ConfigError(f"{type(error).__name__}: {error}") from error
            raise

    def create_log_folder(self) -> None:
        """Create the folder of the run. A hyperparameter search has none, so that it is not taken for the latest run."""
        if self.optimize_hyperparameters:
            return
        while not self.has_folder:
            try:
                os.makedirs(self.save_path)
                self.has_folder = True
            except FileExistsError:
                # Another run was started at the same moment
                run_id = get_latest_run_id(self.log_path, self.env_name) + 1
                self.save_path = os.path.join(self.log_path, f"{self.env_name}_{run_id}")
                self.params_path = f"{self.save_path}/{self.env_name}"
        super().create_log_folder()

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        :return: The entry of the config, checked, and the same as it will be saved
        :raises ConfigError: if the config is not found or something in it is wrong
        """
        if self.resumed_config is not None:
            return self._read_resumed_config(self.resumed_config)
        if self.trial_id == 0 and self.storage and self.study_name:
            # For RL Zoo the first trial is as good as none
            trial = self.load_trial(self.storage, self.study_name, 0)
            self.custom_hyperparams = {**trial, **(self.custom_hyperparams or {})}
        check_config_file(self.config, self.env_name.gym_id)
        try:
            hyperparams, saved_hyperparams = super().read_hyperparameters()
        except ConfigError:
            raise
        except Exception as error:
            if error.args == ("hyperparams",) or getattr(error, "name", None) == "hyperparams":
                raise ConfigError(f"{self.config} has no `hyperparams`, which must be a dict with an entry by env") from None
            # A Python config may raise anything
            if not is_for_user(error) and not is_missing(error, self.config):
                raise
            raise ConfigError(f"{self.config}: {type(error).__name__}: {error}") from error
        return self._checked(hyperparams, self.config), saved_hyperparams

    def _read_resumed_config(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        path = folder / "config.yml"
        print(f"Loading hyperparameters from: {path}")
        hyperparams = read_run_file(path)
        hyperparams.update(self.custom_hyperparams or {})
        if self.env_kwargs:
            hyperparams["env_kwargs"] = self.env_kwargs
        saved_hyperparams = OrderedDict((key, hyperparams[key]) for key in sorted(hyperparams))
        pprint(saved_hyperparams)
        return self._checked(hyperparams, str(path)), saved_hyperparams

    def _checked(self, hyperparams: Any, source: str) -> dict[str, Any]:
        try:
            return check_hyperparams(hyperparams, ALGOS[self.algo])
        except ConfigError as error:
            raise ConfigError(f"{source}, {self.env_name.gym_id}: {error}") from None

    def load_trial(self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True) -> dict[str, Any]:
        """
        :param storage: Storage of the study
        :param study_name: Name of the study
        :param trial_id: Number of the trial, the best one by default
        :param convert: Whether to make keyword arguments of the algorithm of them
        :return: Hyperparameters of the trial
        :raises ConfigError: if there is no such study or trial
        """
        try:
            params = super().load_trial(storage, study_name, trial_id, convert=False)
        except (KeyError, IndexError, ValueError, OSError) as error:
            raise ConfigError(f"--trial-id: no trial {trial_id} of study {study_name!r} in {storage} ({error})") from None
        return HYPERPARAMS_CONVERTER[self.algo](params) if convert else params

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        for key in DEEPCRL_SCHEDULES:
            if isinstance(hyperparams.get(key), str):
                hyperparams[key] = SimpleLinearSchedule(hyperparams[key].removeprefix("lin_"))
        return ExperimentManager._preprocess_schedules(hyperparams)

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable | None, list[BaseCallback], Callable | None]:
        result = super()._preprocess_hyperparams(hyperparams)
        # RL Zoo evaluates without the `env_kwargs` of a config
        self.eval_env_kwargs = {**self.env_kwargs, **(self._eval_env_kwargs_args or {})}
        # It records videos with those of the command line only
        self.args.env_kwargs = self.env_kwargs or None
        if not self.monitor_kwargs and self.entry_point(self.env_name.gym_id).startswith(SUCCESS_REPORTED_BY):
            self.monitor_kwargs = dict(info_keywords=("is_success",))
        return result

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Create the environment and wrap it if necessary.

        :param n_envs: Number of environments
        :param eval_env: Whether is it an environment used for evaluation or not
        :param no_log: Do not log training when doing hyperparameter optim
        :return: the vectorized environment, with appropriate wrappers
        :raises ValueError: if the env does not take an argument
        """
        env_kwargs = self.eval_env_kwargs if eval_env else self.env_kwargs
        with checked_env_kwargs(gym.spec(self.env_name.gym_id), env_kwargs):
            return super().create_envs(n_envs, eval_env, no_log or self.optimize_hyperparameters)

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        if not self.resumes:
            return super()._maybe_normalize(env, eval_env)
        path = sibling(Path(self.trained_agent), "vecnormalize")
        if not path.is_file():
            if self.normalize:
                raise ConfigError(
                    f"-i: {path} is missing, the statistics of VecNormalize that {self.trained_agent} was trained with: "
                    "new ones would spoil it. Choose a model that has them"
                )
            return env
        print(f"Loading VecNormalize stats: {path}")
        vec_normalize = VecNormalize.load(str(path), env)
        if eval_env:
            vec_normalize.training = False
            vec_normalize.norm_reward = False
        return vec_normalize

    def create_callbacks(self) -> None:
        """Create the callbacks that the command line asks for."""
        # Unless the user asks for the tables of Stable-Baselines3
        takes_display = not self.optimize_hyperparameters and self.verbose == 1 and self.log_interval == -1
        asks_env = self.algo != "deepcrl" and (takes_display or self.show_progress)
        needs_env = not self.optimize_hyperparameters and (self.eval_freq > 0 or asks_env)
        # One is enough to see what to display
        n_eval_envs = self.n_eval_envs if self.eval_freq > 0 else 1
        eval_env = self.create_envs(n_eval_envs, eval_env=True) if needs_env else None
        has_goals = self.algo == "deepcrl" if eval_env is None else reports_goals(eval_env)
        if has_goals and (takes_display or self.show_progress):
            self.callbacks.append(TrainingDisplay(replaces_tables=takes_display))
        elif self.show_progress:
            self.callbacks.append(ProgressBarCallback())
        if self.save_freq > 0:
            # Account for the number of parallel environments
            self.save_freq = max(self.save_freq // self.n_envs, 1)
            if self.algo == "deepcrl":
                self.callbacks.append(
                    ResumableCheckpointCallback(
                        self.save_freq, self.save_path, save_replay_buffer=self.save_replay_buffer, verbose=self.verbose
                    )
                )
            else:
                self.callbacks.append(CheckpointCallback(self.save_freq, self.save_path, name_prefix="rl_model", verbose=1))
        if self.eval_freq > 0 and eval_env is not None:
            self.eval_freq = max(self.eval_freq // self.n_envs, 1)
            callback_class = GoalEvalCallback if has_goals else EvalCallback
            self.callbacks.append(
                callback_class(
                    eval_env,
                    callback_on_new_best=SaveVecNormalizeCallback(save_freq=1, save_path=self.params_path),
                    best_model_save_path=self.save_path,
                    n_eval_episodes=self.n_eval_episodes,
                    log_path=self.save_path,
                    eval_freq=self.eval_freq,
                    deterministic=self.deterministic_eval,
                )
            )
        elif eval_env is not None:
            eval_env.close()

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if not self.resumes:
            return super()._load_pretrained_agent(hyperparams, env)
        model_path = Path(self.trained_agent)
        print(f"Loading pretrained agent {model_path}")
        # Policy should not be changed, and learning starts when it would have, where the replay buffer goes on
        kwargs = {key: value for key, value in hyperparams.items() if key not in ("policy", "learning_starts")}
        model = DeepCRL.load(
            model_path,
            env=env,
            seed=self.seed,
            tensorboard_log=self.tensorboard_log,
            verbose=self.verbose,
            device=self.device,
            **kwargs,
        )
        if self.n_timesteps <= model.num_timesteps:
            raise ConfigError(
                f"-i: {model_path} was trained for {model.num_timesteps} steps already, of {self.n_timesteps} in all: "
                "give the number of further steps with -n"
            )
        warmup = hyperparams.get("learning_starts", argument_names(DeepCRL)["learning_starts"])
        buffer_path = sibling(model_path, "replay_buffer")
        # The best model is older than the buffer beside it
        has_own_buffer = model_path.stem == self.env_name or CHECKPOINT.fullmatch(model_path.stem) is not None
        if has_own_buffer and buffer_path.is_file():
            print(f"Loading replay buffer {buffer_path}")
            model.load_replay_buffer(buffer_path, truncate_last_traj=self.truncate_last_trajectory)
            if "learning_starts" in (self.custom_hyperparams or {}):
                model.learning_starts = warmup
        else:
            # Learning from the first few transitions alone would spoil the policy
            print(f"No replay buffer of {model_path.name}: collecting {warmup} steps of random actions first")
            model.learning_starts = model.num_timesteps + warmup
        for callback in self.callbacks:
            # Checkpoints and evaluations at the steps they would have been done without the stop
            callback.n_calls = model.num_timesteps // env.num_envs
            if isinstance(callback, EvalCallback):
                self._continue_evaluations(callback, model_path.parent, model.num_timesteps)
        return model

    def _continue_evaluations(self, callback: EvalCallback, folder: Path, num_timesteps: int) -> None:
        """
        Let the evaluations before and after the stop be one curve, and the best model the best of both.

        :param callback: The callback that goes on
        :param folder: Folder of the run that stopped
        :param num_timesteps: Number of env steps from which it goes on
        """
        best_model = folder / "best_model.zip"
        files = {best_model: Path(self.save_path), sibling(best_model, "vecnormalize"): Path(self.params_path)}
        for path, target in files.items() if best_model.is_file() else ():
            if path.is_file():
                with atomic_path(target / path.name, path.suffix) as temporary:
                    shutil.copyfile(path, temporary)
        if isinstance(callback, GoalEvalCallback):
            callback.continue_episodes(folder / "episodes.csv", num_timesteps)
        try:
            with np.load(folder / "evaluations.npz") as file:
                logs = {key: file[key] for key in file.files}
        except FileNotFoundError:
            return
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            # It was killed while it wrote them
            print(f"{folder / 'evaluations.npz'} cannot be read ({error}): the next evaluation is taken for the best so far")
            return
        if best_model.is_file():
            callback.best_mean_reward = float(logs["results"].mean(axis=1).max())
        if logs["results"].shape[1:] != (callback.n_eval_episodes,):
            print("The evaluations before the stop have another number of episodes: they are not continued")
            return
        is_before = logs["timesteps"] <= num_timesteps
        callback.evaluations_timesteps = logs["timesteps"][is_before].tolist()
        callback.evaluations_results = logs["results"][is_before].tolist()
        callback.evaluations_length = logs["ep_lengths"][is_before].tolist()
        if "successes" in logs:
            callback.evaluations_successes = logs["successes"][is_before].tolist()

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train the model. A run that is continued does the steps that are left of ``n_timesteps``, and its counters and
        schedules go on. If an error ends the training, the model is saved as it is, and the error tells how to go on.

        :param model: an initialized RL model
        """
        kwargs: dict[str, Any] = {"callback": self.callbacks}
        # As RL Zoo does: the default at -1, no log below
        if self.log_interval != -1:
            kwargs["log_interval"] = self.log_interval if self.log_interval > -1 else None
        if self.algo == "ars" and self.n_envs > 1:
            kwargs["async_eval"] = AsyncEval([lambda: self.create_envs(1, no_log=True)] * self.n_envs, model.policy)
        before, n_timesteps = model.num_timesteps, self.n_timesteps
        if self.resumes:
            n_timesteps -= before
            kwargs["reset_num_timesteps"] = False
        try:
            model.learn(n_timesteps, **kwargs)
        except KeyboardInterrupt:
            # The model is saved as it is
            self.is_stopped = True
        except Exception as error:
            if model.num_timesteps != before:
                self._save_after(error, model)
            raise
        finally:
            with uninterrupted():
                # A training that is interrupted leaves them open, and RL Zoo those of the evaluations
                for callback in self.callbacks:
                    if isinstance(callback, EvalCallback):
                        close_env(callback.eval_env)
                    # The terminal may be closed
                    with contextlib.suppress(OSError):
                        if isinstance(callback, TrainingDisplay):
                            callback.stop()
                        elif isinstance(callback, ProgressBarCallback) and hasattr(callback, "pbar"):
                            callback.pbar.close()

    def _save_after(self, error: Exception, model: BaseAlgorithm) -> None:
        """
        :param error: What ended the training. Notes of it tell where the model is, below the traceback
        :param model: The model
        """
        if not all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters()):
            error.add_note("The model is not saved: its parameters are no finite numbers")
            return
        try:
            self.save_trained_model(model)
        except Exception as saving_error:
            error.add_note(f"The model could not be saved: {type(saving_error).__name__}: {saving_error}")
        else:
            error.add_note(self._how_to_go_on(model))

    def _how_to_go_on(self, model: BaseAlgorithm) -> str:
        # Other algorithms don't know what they were trained on
        env = "" if self.algo == "deepcrl" else f"--algo {self.algo} --env {self.env_name.gym_id} "
        return (
            f"Stopped and saved after {model.num_timesteps:,} env steps. To go on from there: "
            f"sb3-deepcrl train {env}-i {shlex.quote(self.save_path)}"
        )

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """
        Save trained model optionally with its replay buffer and ``VecNormalize`` statistics, the model last: if there is
        one, all that belongs to it is there too. No signal interrupts it.

        :param model: The model
        """
        with uninterrupted():
            self._save(model)
        if self.is_stopped:
            tell(self._how_to_go_on(model))
        assert model.env is not None
        close_env(model.env)

    def _save(self, model: BaseAlgorithm) -> None:
        tell(f"Saving to {self.save_path}")
        if not isinstance(model, DeepCRL):
            # It says the same
            with contextlib.redirect_stdout(io.StringIO()):
                super().save_trained_model(model)
            return
        if self.save_replay_buffer:
            model.save_replay_buffer(Path(self.save_path) / "replay_buffer.pkl")
        vec_normalize = model.get_vec_normalize_env()
        if vec_normalize is not None:
            with atomic_path(Path(self.params_path) / "vecnormalize.pkl", ".pkl") as temporary:
                vec_normalize.save(str(temporary))
        model.save(Path(self.save_path) / f"{self.env_name}.zip")
        if self.save_replay_buffer:
            # Those of the checkpoints are older
            for path in replay_buffers(Path(self.save_path)):
                path.unlink()
