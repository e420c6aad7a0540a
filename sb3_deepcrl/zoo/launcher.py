"""
Runs RL Zoo's scripts with DeepCRL registered. Each has a module of its name in this package.
"""

import argparse
import contextlib
import importlib
import io
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import yaml
from gymnasium.envs.registration import EnvSpec
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import ALGOS, StoreDict, get_model_path
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvObs, VecEnvStepReturn, VecEnvWrapper

from sb3_deepcrl.common.startup import end_start
from sb3_deepcrl.common.utils import how_to_write, stopped_by_signals, whole_number
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs.registration import ENTRY_POINT
from sb3_deepcrl.zoo.checkpoints import RunLoader, find_model, num_timesteps, read_run_file, run_config
from sb3_deepcrl.zoo.config import ConfigError

ArgumentParser = argparse.ArgumentParser

# Function of RL Zoo, or None where its module has to be run as a script
SCRIPTS = {
    "train": ("rl_zoo3.train", "train"),
    "enjoy": ("rl_zoo3.enjoy", "enjoy"),
    "record_video": ("rl_zoo3.record_video", None),
    "plot_train": ("rl_zoo3.plots", "plot_train"),
    "plot_from_file": ("rl_zoo3.plots", "plot_from_file"),
    "all_plots": ("rl_zoo3.plots", "all_plots"),
    "push_to_hub": ("rl_zoo3.push_to_hub", None),
}
PLOTS = ("plot_train", "plot_from_file", "all_plots")
DEFAULT_ENV = "PointMaze_UMaze-v3"
# In place of RL Zoo's defaults
DEFAULTS = {"--algo": "deepcrl", "--env": DEFAULT_ENV, "--folder": "logs"}
# Flags of numbers that are at least 1, or the default, which may stand for something else
COUNTS = {"-n", "--eval-episodes", "--n-eval-envs", "--n-envs", "--n-trials", "--max-total-trials", "--n-evaluations"}
# Flags that `all_plots` cannot do without
NEEDED = {"--algos", "--env", "--exp-folders"}
HELP = {
    "--vec-env": "VecEnv type, batch: native threads, for the tasks of sb3_deepcrl",
    "-n": "Number of timesteps, with -i of further ones (default: those of the config, with -i what is left of the run)",
}
# Envs whose pictures are made by MuJoCo
MUJOCO_ENVS = ("sb3_deepcrl.envs", "gymnasium_robotics.envs", "gymnasium.envs.mujoco")
# Arguments of a run that do not hold for its continuation, or are in its config already
NOT_RESUMED = {
    "conf_file",
    "hyperparams",
    "optimize_hyperparameters",
    "seed",
    "storage",
    "study_name",
    "trained_agent",
    "trial_id",
    "uuid",
}


class CheckedStoreDict(StoreDict):
    """RL Zoo's action for dicts (``key:value``), which tells which one it cannot read."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """
        :param parser: The parser
        :param namespace: Where the dict goes
        :param values: The arguments
        :param option_string: The flag
        """
        merged: dict[str, Any] = {}
        for item in values:
            try:
                super().__call__(parser, namespace, [item], option_string)
            except Exception as error:
                raise argparse.ArgumentError(
                    self, f"{item!r} is not `key:value` with a Python value ({error}); text has quotes, key:\"'text'\""
                ) from None
            merged.update(getattr(namespace, self.dest))
        setattr(namespace, self.dest, merged)


def at_least_one(default: int | None) -> Callable[[str], int]:
    """
    :param default: The default of an option, which is allowed in any case
    :return: The ``type`` of the option
    """

    def convert(text: str) -> int:
        number = whole_number(text)
        if number < 1 and number != default:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return number

    return convert


def picture(text: str) -> Path:
    """
    :param text: Where a picture goes
    :return: The same, whose folder exists
    """
    from matplotlib.backend_bases import FigureCanvasBase

    path = Path(text)
    if path.suffix.removeprefix(".").lower() not in FigureCanvasBase.filetypes:
        raise argparse.ArgumentTypeError(f"must be the name of a picture, such as {path.stem or 'figure'}.png, got {text}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{error}: choose another place than {text}") from None
    return path


class ZooArgumentParser(ArgumentParser):
    """
    Takes the place of ``argparse.ArgumentParser`` in RL Zoo's scripts: other defaults, more choices, and one line for each
    error.

    :param args: Arguments of ``argparse.ArgumentParser``
    :param kwargs: Arguments of ``argparse.ArgumentParser``
    """

    script: ClassVar[str]
    #: What the user gave, empty before it is parsed
    parsed: ClassVar[argparse.Namespace] = argparse.Namespace()

    def __init__(self, *args: Any, **kwargs: Any):
        # The script has its parser now; argparse itself refers to its class by this name
        argparse.ArgumentParser = ArgumentParser  # type: ignore[misc]
        # Some of RL Zoo's scripts give a sentence as the name of the program
        description = args[0] if args else None
        super().__init__(prog=f"sb3-deepcrl {self.script}", description=description, **kwargs)
        if self.script in PLOTS:
            self.add_argument("--figure", type=picture, help="Save the figure to this file, in place of showing it")

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:  # type: ignore[override]
        """
        :param names: Flags
        :param kwargs: Other arguments
        :return: The action
        """
        if kwargs.get("action") is StoreDict:
            kwargs["action"] = CheckedStoreDict
        if "--vec-env" in names:
            kwargs["choices"] = [*kwargs["choices"], "batch"]
        if kwargs.get("type") is int:
            kwargs["type"] = whole_number if COUNTS.isdisjoint(names) else at_least_one(kwargs.get("default"))
        if self.script == "all_plots" and not NEEDED.isdisjoint(names):
            kwargs["required"] = True
        for name in names if self.script == "train" else ():
            kwargs["help"] = HELP.get(name, kwargs.get("help"))
        for name, default in DEFAULTS.items():
            if name in names and kwargs.get("nargs") is None and self.script not in PLOTS:
                kwargs.update(default=default, required=False)
        return super().add_argument(*names, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """
        :param args: Arguments of the command line, ``sys.argv`` by default
        :param namespace: Where to put them
        :return: The parsed arguments, checked
        """
        parsed = super().parse_args(args, namespace)
        try:
            if self.script == "train":
                if parsed.trained_agent:
                    parsed = self._resume(parsed, args, namespace)
                spec = find_env(parsed.env, parsed.gym_packages)
                # A run that is continued finds it by these
                parsed.gym_packages = list(dict.fromkeys([*parsed.gym_packages, *parsed.env.split(":")[:-1]]))
                parsed.env = spec.id
                if parsed.vec_env == "batch" and spec.entry_point != ENTRY_POINT:
                    raise ConfigError(
                        f"--vec-env batch: {spec.id} is no task of this package, which alone can be stepped in batches: leave "
                        "it out, or choose one of them, such as --env PointUMaze-v0"
                    )
            elif self.script not in PLOTS:
                spec = find_env(parsed.env.gym_id, getattr(parsed, "gym_packages", []))
                parsed.env = EnvironmentName(spec.id)
                # RL Zoo downloads to a folder of this name what is not there
                if "rl-trained-agents" not in parsed.folder:
                    self._check_model(parsed)
                if not parsed.no_render:
                    check_screen(self.script, spec)
        except ConfigError as error:
            self.error(str(error))
        type(self).parsed = parsed
        return parsed

    def _resume(self, parsed: argparse.Namespace, args: Any, namespace: Any) -> argparse.Namespace:
        """
        What the command line does not tell about a run to continue is as it was.

        :param parsed: The parsed arguments
        :param args: Arguments of the command line
        :param namespace: Where to put them
        :return: The arguments with those of the run, and the model to go on from
        """
        model_path = find_model(parsed.trained_agent)
        config = run_config(Path(model_path))
        n_more = parsed.n_timesteps
        if config is not None:
            saved = read_run_file(config / "args.yml")
            if saved.get("algo") == "deepcrl":
                self.set_defaults(**{key: value for key, value in saved.items() if key not in NOT_RESUMED})
                parsed = super().parse_args(args, namespace)
        if n_more > 0 and parsed.algo == "deepcrl":
            # For a run of DeepCRL it is the number in all from here on
            parsed.n_timesteps = num_timesteps(Path(model_path)) + n_more
        parsed.trained_agent = model_path
        return parsed

    @staticmethod
    def _check_model(parsed: argparse.Namespace) -> None:
        """
        :param parsed: Arguments of a script that loads a model
        :raises ConfigError: if there is none
        """
        choice = (parsed.load_best, parsed.load_checkpoint, parsed.load_last_checkpoint)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                get_model_path(parsed.exp_id, parsed.folder, parsed.algo, parsed.env, *choice)
        except (AssertionError, ValueError) as error:
            raise ConfigError(f"--env {parsed.env.gym_id}: {error}") from None

    def error(self, message: str) -> Any:
        """
        :param message: What is wrong
        """
        self.exit(2, f"{self.prog}: error: {message}\n")


def find_env(env_id: str, gym_packages: Sequence[str]) -> EnvSpec:
    """
    :param env_id: Id of an env
    :param gym_packages: Modules that register envs
    :return: Its specification
    :raises ConfigError: if there is none
    """
    try:
        return find_spec(env_id, gym_packages)
    except gym.error.Error as error:
        raise ConfigError(f"--env: {error}") from None


def has_screen() -> bool:
    """
    :return: Whether there is a screen that windows can be shown on
    """
    if sys.platform != "linux":
        return True
    if not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        return False
    # It may be that of a connection which was closed. MuJoCo shows its windows with glfw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(importlib.import_module("glfw").init())


def check_screen(script: str, spec: EnvSpec) -> None:
    """
    Check that MuJoCo has something to draw on: without a screen it aborts the process, or says little.

    :param script: Name of the script
    :param spec: Specification of an env
    :raises ConfigError: if it has nothing
    """
    if not str(spec.entry_point).startswith(MUJOCO_ENVS) or has_screen():
        return
    if script == "enjoy":
        raise ConfigError(
            f"there is no screen to show {spec.id} on: add --no-render, or make a video by "
            f"`MUJOCO_GL=egl sb3-deepcrl record_video --env {spec.id}`"
        )
    library = os.environ.get("MUJOCO_GL", "")
    reason = ""
    if library.lower() not in ("", "glfw"):
        try:
            importlib.import_module("mujoco").GLContext(1, 1).free()
            return
        except Exception as error:
            # Whatever goes wrong in it, such as an AttributeError where the library is not installed
            reason = f"MUJOCO_GL={library} does not work here ({type(error).__name__}: {error}): "
    raise ConfigError(
        f"{reason}without a screen the pictures of {spec.id} need MUJOCO_GL=egl (Debian: libegl1) or MUJOCO_GL=osmesa "
        f"(libosmesa6) in front of the command: `MUJOCO_GL=egl sb3-deepcrl {script} ...`"
    )


class PredictionDeepCRL(DeepCRL):
    """DeepCRL that is only watched: no memory is taken for a replay buffer."""

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> DeepCRL:  # type: ignore[override]
        """
        :param path: path to the file (or a file-like) where to load the agent from
        :param args: Other arguments of ``DeepCRL.load``
        :param kwargs: Other arguments of ``DeepCRL.load``
        :return: new model instance with loaded parameters
        """
        return DeepCRL.load(path, *args, **{**kwargs, "buffer_size": 1})


# Name of the algorithm in model cards
PredictionDeepCRL.__name__ = DeepCRL.__name__


class SuccessRecorder(VecEnvWrapper):
    """
    Records of the first env, whose episodes RL Zoo counts, whether they reach the goal at any step.

    :param venv: The env
    :param successes: Where to put it, an entry for each episode
    """

    def __init__(self, venv: VecEnv, successes: list[bool]):
        super().__init__(venv)
        self.successes = successes
        self.is_success = False

    def reset(self) -> VecEnvObs:
        """
        :return: The first observations
        """
        self.is_success = False
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: Observations, rewards, dones and infos
        """
        observations, rewards, dones, infos = self.venv.step_wait()
        self.is_success |= bool(infos[0].get("is_success"))
        if dones[0]:
            self.successes.append(self.is_success)
            self.is_success = False
        return observations, rewards, dones, infos


@contextlib.contextmanager
def successes_named() -> Iterator[None]:
    """
    Let RL Zoo's ``enjoy`` say that its success rate is the one at the last step of the episodes, beside the one at any step.
    """
    enjoy = importlib.import_module("rl_zoo3.enjoy")
    create_test_env = enjoy.create_test_env
    successes: list[bool] = []

    def create_recorded_env(*args: Any, **kwargs: Any) -> VecEnv:
        return SuccessRecorder(create_test_env(*args, **kwargs), successes)

    def print_named(text: str, *values: Any) -> None:
        if text.startswith("Success rate: "):
            rate = text.removeprefix("Success rate: ")
            text = f"Success at any step: {100 * np.mean(successes):.2f}%, at the last step: {rate}"
        print(text, *values)

    with (
        patch.object(enjoy, "create_test_env", create_recorded_env),
        patch.object(enjoy, "print", print_named, create=True),
    ):
        yield


def hub_metadata(*args: Any) -> dict[str, Any]:
    """
    :param args: Names of algorithm and env, mean and standard deviation of the reward
    :return: Metadata of a model card
    """
    return importlib.import_module("huggingface_sb3.push_to_hub")._generate_metadata(*args).to_dict()


@contextlib.contextmanager
def zoo_replaced(script: str) -> Iterator[type[ZooArgumentParser]]:
    """
    What RL Zoo's scripts find in place of its own, for the time of the ``with`` statement.

    :param script: Name of the script
    :return: The parser of its arguments
    """
    parser_class: type[ZooArgumentParser] = type("ZooArgumentParser", (ZooArgumentParser,), {"script": script})
    with contextlib.ExitStack() as stack:
        # It reads the files of runs with it
        stack.enter_context(patch.object(yaml, "UnsafeLoader", RunLoader))
        stack.enter_context(patch.object(argparse, "ArgumentParser", parser_class))
        if script == "train":
            from sb3_deepcrl.zoo.callbacks import make_trial_callback
            from sb3_deepcrl.zoo.exp_manager import GoalExperimentManager

            stack.enter_context(patch("rl_zoo3.train.ExperimentManager", GoalExperimentManager))
            stack.enter_context(patch("rl_zoo3.exp_manager.TrialEvalCallback", make_trial_callback))
        elif script in PLOTS:
            import matplotlib.pyplot as plt

            show = plt.show
            stack.enter_context(
                patch.object(plt, "show", lambda: save_figures(path) if (path := parser_class.parsed.figure) else show())
            )
        else:
            stack.enter_context(patch.dict(ALGOS, deepcrl=PredictionDeepCRL))
        if script == "enjoy":
            stack.enter_context(successes_named())
        if script == "push_to_hub":
            hub = importlib.import_module("huggingface_sb3.push_to_hub")
            if not hasattr(hub, "generate_metadata"):
                # The name that RL Zoo 2.9.2 imports is gone in release 3.2 of what it asks for
                stack.enter_context(patch.object(hub, "generate_metadata", hub_metadata, create=True))
        yield parser_class


def save_figures(path: Path) -> None:
    """
    :param path: Where the first figure goes; a further one has a number in its name
    """
    import matplotlib.pyplot as plt

    for index, number in enumerate(plt.get_fignums(), start=1):
        target = path if index == 1 else path.with_stem(f"{path.stem}-{index}")
        plt.figure(number).savefig(target, dpi=150)
        plt.close(number)
        print(f"Figure: {target}")


def run(script: str, argv: Sequence[str] | None = None) -> None:
    """
    Run one of RL Zoo's scripts.

    :param script: Name of the script
    :param argv: Arguments of the command line, ``sys.argv`` by default
    :raises SystemExit: with one line, if something that the user gave cannot be used; with 128 and the number of a signal, if
        one has stopped the training
    """
    end_start()
    argv = sys.argv[1:] if argv is None else list(argv)
    module, function = SCRIPTS[script]
    try:
        # Nothing but the script itself shall find what is replaced below
        importlib.import_module("rl_zoo3.exp_manager" if function is None else module)
    except ModuleNotFoundError as error:
        sys.exit(f'sb3-deepcrl {script}: error: {error}: install the extra "zoo", in a clone by `pip install -e ".[zoo]"`')
    numbers: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", [f"sb3-deepcrl {script}", *argv]))
        parser_class = stack.enter_context(zoo_replaced(script))
        if script == "train":
            # Elsewhere there is nothing to save
            numbers = stack.enter_context(stopped_by_signals())
        try:
            if function is None:
                runpy.run_module(module, run_name="__main__")
            else:
                getattr(importlib.import_module(module), function)()
        except (ConfigError, gym.error.DependencyNotInstalled) as error:
            sys.exit(f"sb3-deepcrl {script}: error: {error}")
        except OSError as error:
            if (advice := how_to_write(error, vars(parser_class.parsed).values())) is None:
                raise
            sys.exit(f"sb3-deepcrl {script}: error: {error}: {advice}")
        except KeyboardInterrupt:
            # Before the training or after it
            if not numbers:
                raise
    if numbers:
        # As shells do
        sys.exit(128 + numbers[0])
