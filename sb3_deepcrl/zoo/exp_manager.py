import contextlib
import difflib
import inspect
import json
import os
import re
import shlex
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pprint import pprint
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import numpy as np
import rl_zoo3.exp_manager as rl_zoo_manager
import torch as th
from huggingface_sb3 import EnvironmentName
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, SimpleLinearSchedule, get_latest_run_id
from sb3_contrib.common.vec_env import AsyncEval
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_deepcrl.common.callbacks import GoalEvalCallback, ResumableEvalCallback, TrainingDisplay
from sb3_deepcrl.common.distributed import Ranks
from sb3_deepcrl.common.utils import atomic_path, check_positive_int, tell, uninterrupted
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.envs import BatchVecEnv
from sb3_deepcrl.envs.arguments import checked_env_kwargs, default_arguments
from sb3_deepcrl.envs.registration import ENTRY_POINT
from sb3_deepcrl.tensor_envs import WarpVecEnv
from sb3_deepcrl.zoo.callbacks import ResumableCheckpointCallback, reports_goals, save_model
from sb3_deepcrl.zoo.config import describe_input_error, find_config
from sb3_deepcrl.zoo.provenance import made_with
from sb3_deepcrl.zoo.runs import RunFolder, num_timesteps

# Envs that report `is_success`: these packages, see `sb3_deepcrl.zoo`
SUCCESS_REPORTED_BY = ("sb3_deepcrl.envs", "gymnasium_robotics.envs.maze", "gymnasium_robotics.envs.fetch")
# Learning rates of DeepCRL that may be text such as `lin_3e-4`, as RL Zoo has it for `learning_rate`
SCHEDULES = ("critic_learning_rate", "ent_coef_learning_rate")
# What a config has beside the arguments of the algorithm
ZOO_KEYS = (
    *("n_envs", "n_timesteps", "normalize", "frame_stack", "env_kwargs", "env_wrapper", "vec_env_wrapper", "monitor_kwargs"),
    *("callback", "noise_type", "noise_std"),
)
# All runs are evaluated on the same starts and goals
EVAL_SEED = 10_000


def _derived_seed(*numbers: int) -> int:
    """A seed that has nothing to do with that of other numbers, nor has the next one: envs are seeded with both."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


class GoalExperimentManager(ExperimentManager):
    """
    RL Zoo's experiment manager with what it lacks: configs of this package, ``BatchVecEnv``, evaluation by success and time
    at goal, runs that go on where they stopped, and a record of what they were made with.

    :param args: Arguments of the command line. Beyond RL Zoo's there may be ``resume``, to go on with the newest run of the
        env in its own folder, ``eval_env``, the id of the env for evaluations, and ``dataset`` and ``offline_updates``, to
        learn from data before the first step.
    :param algo: Name of the algorithm
    :param env_id: Id of the env
    :param log_folder: Folder of all runs
    :param positional: Other arguments of RL Zoo's experiment manager
    :param vec_env_type: "dummy", "subproc", "batch", "warp", or "auto" for "batch" where the env is one of this package
    :param config: Config, see :func:`~sb3_deepcrl.zoo.config.find_config`
    :param kwargs: Other arguments of RL Zoo's experiment manager
    """

    def __init__(
        self,
        args: Any,
        algo: str,
        env_id: str,
        log_folder: str,
        *positional: Any,
        vec_env_type: str = "dummy",
        config: str | None = None,
        **kwargs: Any,
    ):
        self.ranks = Ranks()
        if self.ranks.size > 1 and algo != "deepcrl":
            raise ValueError(
                f"--algo: {algo} cannot be trained by {self.ranks.size} ranks, only deepcrl can: leave torchrun out"
            )
        is_zoos = vec_env_type in ("dummy", "subproc")
        kwargs.update(vec_env_type=vec_env_type if is_zoos else "dummy", config=find_config(config, algo, env_id))
        super().__init__(args, algo, env_id, log_folder, *positional, **kwargs)
        check_positive_int(self.n_eval_episodes, "eval_episodes")
        check_positive_int(self.n_eval_envs, "n_eval_envs")
        self.vec_env_type = vec_env_type
        self.eval_env_id = getattr(args, "eval_env", None) or env_id
        # Whether this process has created the folder of the run, and whether the training was interrupted
        self.has_folder = self.is_stopped = False
        self.resume = getattr(args, "resume", False)
        self.dataset = getattr(args, "dataset", None)
        if self.dataset is not None and algo != "deepcrl":
            raise ValueError(f"--dataset: {algo} does not learn from data, only deepcrl does")
        if self.resume and self.optimize_hyperparameters:
            raise ValueError("--resume: a search of hyperparameters goes on by --storage and --study-name")
        if self.ranks.size > 1 and self.optimize_hyperparameters:
            raise ValueError(
                "-optimize: ranks train one model: leave torchrun out, and let several searches share a --storage"
            )
        if self.resume and (run := RunFolder.newest(log_folder, algo, env_id)) is not None:
            self.save_path, self.params_path = str(run.path), str(run.path / self.env_name)
            self.trained_agent = str(run.model_path or "")
        # The other ranks may look for it too late, or choose another seed
        names = ("save_path", "params_path", "trained_agent", "seed")
        vars(self).update(self.ranks.broadcast({name: getattr(self, name) for name in names}))
        self.continue_training = bool(self.trained_agent)
        # What is continued: its folder, its number of steps and its config, if it has one and no other is asked for
        self.source = RunFolder(Path(self.trained_agent).parent)
        self.n_done = num_timesteps(Path(self.trained_agent)) if self.continue_training else 0
        has_config = self.continue_training and self.source.params_path is not None
        self.resumed_config = self.source.config() if has_config and config is None else None
        if self.continue_training and not self.resume:
            if self.n_timesteps > 0:
                self.n_timesteps += self.n_done
            elif has_config:
                self.n_timesteps = self.source.args()["n_timesteps"]
            args.n_timesteps = self.n_timesteps

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """
        Read hyperparameters, pre-process them, create the environment and possibly the model.

        :return: the initialized RL model and its hyperparameters, None for a search of hyperparameters
        :raises ValueError: If something that the user gave cannot be used. A new folder of the run is removed then.
        """
        try:
            result = super().setup_experiment()
            if result is not None:
                self._load_dataset(result[0])
        except BaseException as error:
            if self.has_folder:
                shutil.rmtree(self.save_path, ignore_errors=True)
            if (message := describe_input_error(error)) is not None:
                raise ValueError(f"{self._source(message)}: {message}") from error
            raise
        if result is not None:
            model, hyperparams = result
            assert model.env is not None
            # Envs are seeded with consecutive numbers: with those of the models, seeds 0 and 1 would share all envs but one
            model.env.seed(_derived_seed(self.seed, self.n_done, self.ranks.rank))
            envs = {"env": (self.env_name.gym_id, self.env_kwargs), "eval_env": (self.eval_env_id, self.eval_env_kwargs)}
            before = self.source.made_with() if self.continue_training else []
            records = [record for record in before if record["num_timesteps"] < self.n_done]
            if self.ranks.rank == 0:
                with atomic_path(Path(self.params_path) / "made_with.json", ".json") as temporary:
                    temporary.write_text(json.dumps([*records, made_with(model, hyperparams, envs)], indent=2) + "\n")
        return result

    def _load_dataset(self, model: BaseAlgorithm) -> None:
        """Load the data set that is learned from before the first step."""
        if self.dataset is None or model.num_timesteps > 0:
            return
        assert isinstance(model, DeepCRL) and model.replay_buffer is not None
        if model.replay_buffer.n_used == 0:
            model.load_dataset(self.dataset)

    def _source(self, message: str) -> str:
        """Where the user has written what an error message is about."""
        if self.dataset is not None and self.dataset in message:
            return "--dataset"
        given = self.custom_hyperparams or {}
        for name, value in given.items():
            if re.search(rf"\b{re.escape(name)}\b", message):
                return f"--hyperparams {name}:{value}"
        return f"{self.config}{' with --hyperparams' if given else ''}, {self.env_name.gym_id}"

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if self.ranks.rank > 0:
            return
        # A run that goes on has its files, whatever interrupts this
        params_path = self.params_path
        with TemporaryDirectory(prefix=".", dir=params_path) as self.params_path, uninterrupted():
            try:
                super()._save_config(saved_hyperparams)
            finally:
                folder, self.params_path = Path(self.params_path), params_path
            for path in folder.iterdir():
                os.replace(path, Path(params_path) / path.name)

    def create_log_folder(self) -> None:
        """
        Create the folder of the run. A hyperparameter search has none, so that it is not taken for the latest run.

        :raises SystemExit: If there is nothing left to do
        """
        if self.optimize_hyperparameters:
            return
        if self.continue_training and self.n_done >= self.n_timesteps and not self._lacks_evaluation():
            if self.resume:
                tell(f"{self.save_path} is complete: {self.n_done:,} of {self.n_timesteps:,} env steps")
                sys.exit()
            raise ValueError(
                f"-i: {self.trained_agent} was trained for {self.n_done} steps already, of {self.n_timesteps} in all: give "
                "the number of further steps with -n"
            )
        if self.ranks.rank == 0:
            if self.resume and Path(self.save_path).is_dir():
                for leftover in Path(self.save_path).glob("**/.*.tmp"):
                    # Of a process that was killed while it wrote
                    leftover.unlink()
            else:
                self._create_new_folder()
            super().create_log_folder()
        self.save_path, self.params_path = self.ranks.broadcast((self.save_path, self.params_path))

    def _lacks_evaluation(self) -> bool:
        """Whether the run was stopped in the middle of its last evaluation."""
        eval_freq = max(self.eval_freq // self.n_envs, 1)
        is_due = self.resume and self.eval_freq > 0 and self.n_done // self.n_envs % eval_freq == 0
        return is_due and self.n_done not in self.source.evaluations().get("timesteps", ())

    def _create_new_folder(self) -> None:
        while not self.has_folder:
            try:
                os.makedirs(self.save_path)
                self.has_folder = True
            except FileExistsError:
                # Another run was started at the same moment
                run_id = get_latest_run_id(self.log_path, self.env_name) + 1
                self.save_path = os.path.join(self.log_path, f"{self.env_name}_{run_id}")
                self.params_path = f"{self.save_path}/{self.env_name}"

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the hyperparameters, also as they will be saved. Those of a run that goes on are in its own config."""
        if self.resumed_config is None:
            if self.trial_id == 0 and self.storage and self.study_name:
                # For RL Zoo the first trial is as good as none
                trial = self.load_trial(self.storage, self.study_name, 0)
                self.custom_hyperparams = {**trial, **(self.custom_hyperparams or {})}
            return super().read_hyperparameters()
        self.config = str(self.source.params_path)
        print(f"Loading hyperparameters from: {self.config}")
        given = {"env_kwargs": self.env_kwargs} if self.env_kwargs else {}
        hyperparams = {**self.resumed_config, **(self.custom_hyperparams or {}), **given}
        saved_hyperparams = OrderedDict(sorted(hyperparams.items()))
        pprint(saved_hyperparams)
        return hyperparams, saved_hyperparams

    def load_trial(self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True) -> dict[str, Any]:
        """See RL Zoo's experiment manager. An unknown trial is an error that names it."""
        try:
            return super().load_trial(storage, study_name, trial_id, convert)
        except (LookupError, OSError) as error:
            raise ValueError(f"--trial-id: no trial {trial_id} of study {study_name!r} in {storage} ({error})") from None

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        for key, value in hyperparams.items():
            if not isinstance(value, str):
                continue
            with contextlib.suppress(ValueError):
                float(value)
                # YAML reads 3e-4 as text, which fails somewhere else or never
                raise TypeError(f"`{key}: {value}` is text: write `!!float {value}`")
            if key in SCHEDULES:
                hyperparams[key] = SimpleLinearSchedule(value.removeprefix("lin_"))
        return ExperimentManager._preprocess_schedules(hyperparams)

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable | None, list[BaseCallback], Callable | None]:
        result = super()._preprocess_hyperparams(hyperparams)
        if self.args.n_timesteps == 0:
            # For RL Zoo that is no number of steps
            self.n_timesteps = 0
        # What is left goes to the algorithm, but for the noise, which RL Zoo makes when it knows the env
        known = inspect.signature(ALGOS[self.algo]).parameters
        for name in result[0]:
            if name not in known and name not in ZOO_KEYS:
                matches = difflib.get_close_matches(name, [*known, *ZOO_KEYS], n=1)
                advice = f": did you mean {matches[0]!r}?" if matches else ""
                raise ValueError(f"{ALGOS[self.algo].__name__} has no argument {name!r}{advice}")
        check_positive_int(self.n_envs, "n_envs")
        self.ranks.share(self.n_envs)
        # RL Zoo evaluates without the `env_kwargs` of a config
        self.eval_env_kwargs = {**self.env_kwargs, **(self._eval_env_kwargs_args or {})}
        # It records videos with those of the command line only
        self.args.env_kwargs = self.env_kwargs or None
        if not self.monitor_kwargs and self.entry_point(self.env_name.gym_id).startswith(SUCCESS_REPORTED_BY):
            self.monitor_kwargs = dict(info_keywords=("is_success",))
        first = Path(self.save_path) / "0.monitor.csv"
        if self.resume and self.continue_training and first.is_file():
            self.monitor_kwargs = {**self.monitor_kwargs, "override_existing": False}
            # Those of more envs than before need the lines that others begin with
            files = [first.with_name(f"{index}.monitor.csv") for index in range(self.n_envs)]
            with first.open() as file:
                header = file.readline() + file.readline()
            for path in files if self.ranks.rank == 0 else []:
                if not path.is_file():
                    path.write_text(header)
        return result

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """See RL Zoo's experiment manager. Evaluation may have another env, and has the same seed in all runs."""
        if not eval_env and self.ranks.size > 1:
            own = self.ranks.share(n_envs)
            # Files of episodes are numbered through
            vars(rl_zoo_manager).update(make_vec_env=partial(make_vec_env, start_index=own.start))
            n_envs = len(own)
        env_id = self.eval_env_id if eval_env else self.env_name.gym_id
        env_kwargs = self.eval_env_kwargs if eval_env else self.env_kwargs
        if self.vec_env_type in ("auto", "batch", "warp"):
            is_batch = self.entry_point(env_id) == ENTRY_POINT and self.env_wrapper is None
            self.vec_env_class = BatchVecEnv if is_batch or self.vec_env_type != "auto" else DummyVecEnv
            if self.vec_env_type == "warp" and not eval_env:
                # Evaluations are exact, and their infos tell of each step
                self.vec_env_class = WarpVecEnv
            self.vec_env_kwargs = {"n_threads": min(th.get_num_threads(), n_envs)} if is_batch else {}
        env_name, seed = self.env_name, self.seed
        if eval_env:
            self.env_name, self.seed = EnvironmentName(env_id), EVAL_SEED
        try:
            with checked_env_kwargs(gym.spec(env_id), env_kwargs):
                return super().create_envs(n_envs, eval_env, no_log or self.optimize_hyperparameters)
        finally:
            self.env_name, self.seed = env_name, seed

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        if not self.continue_training:
            return super()._maybe_normalize(env, eval_env)
        path = self.source.sibling(Path(self.trained_agent), "vecnormalize")
        if path.is_file():
            print(f"Loading VecNormalize stats: {path}")
            env = VecNormalize.load(str(path), env)
            if eval_env:
                env.training = env.norm_reward = False
        elif self.normalize:
            raise ValueError(
                f"{path} is missing, the statistics of VecNormalize that {self.trained_agent} was trained with: "
                "new ones would spoil it. Choose a model that has them"
            )
        return env

    def create_callbacks(self) -> None:
        """Create the callbacks that the command line asks for, on the rank that has them."""
        if self.ranks.rank > 0:
            return
        eval_env = None
        if self.eval_freq > 0 and not self.optimize_hyperparameters:
            eval_env = self.create_envs(self.n_eval_envs, eval_env=True)
        has_goals = self.algo == "deepcrl" if eval_env is None else reports_goals(eval_env)
        # Unless the user asks for the tables of Stable-Baselines3
        takes_display = has_goals and not self.optimize_hyperparameters and self.verbose == 1 and self.log_interval == -1
        if takes_display or self.show_progress:
            self.callbacks.append(TrainingDisplay(replaces_tables=takes_display) if has_goals else ProgressBarCallback())
        if eval_env is not None:
            if self.continue_training and not self.resume and self._has_same_evaluations():
                self._copy_evaluations()
            callback_class = GoalEvalCallback if has_goals else ResumableEvalCallback
            self.callbacks.append(
                callback_class(
                    eval_env,
                    callback_on_new_best=SaveVecNormalizeCallback(save_freq=1, save_path=self.params_path),
                    best_model_save_path=self.save_path,
                    n_eval_episodes=self.n_eval_episodes,
                    log_path=self.save_path,
                    eval_freq=max(self.eval_freq // self.n_envs, 1),
                    deterministic=self.deterministic_eval,
                    resume=self.continue_training,
                    evaluate_first=self.dataset is not None,
                )
            )
        if self.save_freq > 0:
            # After the evaluation of the same step, which would be missing if the run was killed in between
            save_freq = max(self.save_freq // self.n_envs, 1)
            checkpoints = ResumableCheckpointCallback(save_freq, self.save_path, save_replay_buffer=self.save_replay_buffer)
            self.callbacks.append(checkpoints)

    def _has_same_evaluations(self) -> bool:
        """Whether the run that is continued was evaluated as this one is."""
        if self.source.params_path is None:
            return False
        args = self.source.args()
        kwargs = {**(args.get("env_kwargs") or {}), **(args.get("eval_env_kwargs") or {})}
        then = (args.get("eval_env") or args["env"], kwargs, args.get("eval_episodes"))
        return then == (self.eval_env_id, self.eval_env_kwargs, self.n_eval_episodes)

    def _copy_evaluations(self) -> None:
        """Let the evaluations before and after the stop be one curve, and the best model the best of both."""
        best_model = self.source.path / "best_model.zip"
        statistics = self.source.sibling(best_model, "vecnormalize")
        for path in (self.source.path / "evaluations.npz", best_model, statistics):
            if path.is_file():
                shutil.copy(path, self.params_path if path == statistics else self.save_path)

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        path = Path(self.trained_agent)
        print(f"Loading pretrained agent {path}")
        # Policy should not be changed, and learning starts when it would have, where the replay buffer goes on
        kept = {"policy", "policy_kwargs", "learning_starts"}
        model = ALGOS[self.algo].load(
            path,
            env=env,
            # Not the random numbers of the beginning again
            seed=_derived_seed(self.seed, self.n_done),
            tensorboard_log=self.tensorboard_log,
            verbose=self.verbose,
            device=self.device,
            **{key: value for key, value in hyperparams.items() if key not in kept},
        )
        buffer_path = self.source.sibling(path, "replay_buffer")
        if isinstance(model, OffPolicyAlgorithm) and buffer_path.is_file():
            print(f"Loading replay buffer {buffer_path}")
            model.load_replay_buffer(buffer_path, truncate_last_traj=self.truncate_last_trajectory)
            assert model.replay_buffer is not None
            if (n_before := model.replay_buffer.n_envs) != env.num_envs and not isinstance(model, DeepCRL):
                raise ValueError(
                    f"n_envs: the replay buffer {buffer_path} is that of {n_before} envs, {self.algo} cannot fill it with "
                    f"{self.n_envs}: use {n_before} again, or move the file to begin with an empty one"
                )
        elif isinstance(model, OffPolicyAlgorithm):
            # Learning from the first few transitions alone would spoil the policy
            warmup = hyperparams.get("learning_starts", default_arguments(type(model))["learning_starts"])
            print(f"No replay buffer of {path.name}: collecting {warmup} steps of random actions first")
            model.learning_starts = model.num_timesteps + warmup
        for callback in self.callbacks:
            # Checkpoints at the steps they would have been done without the stop
            callback.n_calls = model.num_timesteps // self.n_envs
        return model

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train the model. A run that is continued does the steps that are left of ``n_timesteps``, and its counters and
        schedules go on. If an error ends the training, the model is saved as it is, and the error tells how to go on.
        """
        kwargs: dict[str, Any] = {"callback": self.callbacks, "reset_num_timesteps": not self.continue_training}
        # As RL Zoo does: the default at -1, no log below
        if self.log_interval != -1:
            kwargs["log_interval"] = self.log_interval if self.log_interval > -1 else None
        if self.algo == "ars" and self.n_envs > 1:
            kwargs["async_eval"] = AsyncEval([lambda: self.create_envs(1, no_log=True)] * self.n_envs, model.policy)
        try:
            if self.dataset is not None and model.num_timesteps == 0:
                assert isinstance(model, DeepCRL)
                if self.args.offline_updates > model._n_updates:
                    model.learn_offline(self.args.offline_updates - model._n_updates)
                # Those of the data are there
                model.learning_starts = 0
            model.learn(self.n_timesteps - self.n_done, **kwargs)
        except KeyboardInterrupt:
            # The model is saved as it is
            self.is_stopped = True
        except Exception as error:
            # Nobody can save the transitions of ranks that are gone
            is_whole = getattr(model, "_ranks", self.ranks).is_whole
            if is_whole and self.ranks.broadcast(model.num_timesteps != self.n_done):
                self._save_after(error, model)
            raise
        finally:
            with uninterrupted():
                # A training that is interrupted leaves them open, and RL Zoo those of the evaluations
                for callback in self.callbacks:
                    # The terminal may be closed, and processes of envs may have been ended by the signal that stops this one
                    with contextlib.suppress(EOFError, OSError):
                        if isinstance(callback, EvalCallback):
                            callback.eval_env.close()
                        elif isinstance(callback, TrainingDisplay):
                            callback.stop()
                        elif isinstance(callback, ProgressBarCallback) and hasattr(callback, "pbar"):
                            callback.pbar.close()

    def _save_after(self, error: Exception, model: BaseAlgorithm) -> None:
        """Save a model after an error, whose notes tell below the traceback where it is."""
        note = "The model is not saved: its parameters are no finite numbers"
        if all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters()):
            try:
                self.save_trained_model(model)
                note = self._how_to_go_on(model)
            except Exception as saving_error:
                note = f"The model could not be saved: {type(saving_error).__name__}: {saving_error}"
        error.add_note(note)

    def _how_to_go_on(self, model: BaseAlgorithm) -> str:
        return f"Stopped and saved after {model.num_timesteps:,} env steps. To go on from there: sb3-deepcrl train " + (
            "with the same arguments" if self.resume else f"-i {shlex.quote(self.save_path)}"
        )

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """Save trained model optionally with its replay buffer and ``VecNormalize`` statistics. No signal interrupts it."""
        with uninterrupted():
            tell(f"Saving to {self.save_path}")
            save_model(model, Path(self.save_path) / f"{self.env_name}.zip", self.save_replay_buffer)
            # No rank ends before, as `torchrun` then stops the others
            self.ranks.broadcast(None)
        if self.is_stopped:
            tell(self._how_to_go_on(model))
        else:
            packages = ["--gym-packages", *self.args.gym_packages] if self.args.gym_packages else []
            words = ["--algo", self.algo, "--env", self.env_name.gym_id, *packages, "-f", str(Path(self.log_path).parent)]
            run = shlex.join(words)
            tell(f"To watch it: sb3-deepcrl enjoy {run}")
            tell(f"To train it further: sb3-deepcrl train -i {shlex.quote(self.save_path)} -n 10000")
        assert model.env is not None
        with contextlib.suppress(EOFError, OSError):
            model.env.close()
