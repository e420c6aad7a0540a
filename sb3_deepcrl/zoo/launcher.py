"""
Runs RL Zoo's scripts with DeepCRL registered.
"""

import argparse
import importlib
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rl_zoo3.train
import rl_zoo3.utils
import yaml

import sb3_deepcrl
from sb3_deepcrl.common.distributed import comes_first, connect
from sb3_deepcrl.common.startup import end_start
from sb3_deepcrl.common.utils import how_to_write, stopped_by_signals, whole_number
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs.arguments import default_env_kwargs
from sb3_deepcrl.zoo.config import describe_input_error
from sb3_deepcrl.zoo.exp_manager import GoalExperimentManager
from sb3_deepcrl.zoo.runs import AGENTS, RunFolder, RunLoader

DEFAULT_ENV = "PointMaze_UMaze-v3"
PLOTS = ("plot_train", "plot_from_file", "all_plots")
SCRIPTS = {
    "train": "train an agent, continue a run, or search hyperparameters",
    "enjoy": "show a trained agent, or evaluate it without a picture",
    "record_video": "record a video of a trained agent",
    "plot_train": "plot the training reward, success or length of runs",
    "plot_from_file": "plot what all_plots has written to a file",
    "all_plots": "plot and tabulate the evaluations of runs",
    "push_to_hub": "upload a trained agent to the Hugging Face Hub",
    "load_from_hub": "download a trained agent from the Hugging Face Hub",
}
# Envs whose pictures are made by MuJoCo
MUJOCO_ENVS = ("sb3_deepcrl.envs", "gymnasium_robotics.envs", "gymnasium.envs.mujoco")
# Arguments of a run that do not hold for its continuation, or are in its config already
NOT_CONTINUED = {
    *("conf_file", "hyperparams", "n_timesteps", "optimize_hyperparameters", "resume", "seed", "storage", "study_name"),
    *("trained_agent", "trial_id", "uuid"),
}


class StoreDict(rl_zoo3.utils.StoreDict):
    """RL Zoo's reader of ``key:value``, which says what is wrong with something else."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for text in values:
            if not re.match(r"\w+:.", text):
                raise argparse.ArgumentError(self, f"expected key:value, as in depth:8, got {text!r}")
        super().__call__(parser, namespace, values, option_string)


class TrainParser(argparse.ArgumentParser):
    """RL Zoo's arguments of ``train``, and more of :class:`~sb3_deepcrl.zoo.exp_manager.GoalExperimentManager`."""

    def add_argument(self, *flags: Any, **kwargs: Any) -> argparse.Action:  # type: ignore[override]
        """See ``argparse.ArgumentParser``. Some of RL Zoo's arguments mean more here."""
        if "--vec-env" in flags:
            kwargs.update(default="auto", choices=["auto", "batch", "warp", "dummy", "subproc"])
            kwargs["help"] = (
                "VecEnv type, batch: native, for the tasks of sb3_deepcrl; warp: these on a GPU (evaluated with batch); auto: "
                "batch for these, else dummy"
            )
        elif kwargs.get("type") is int:
            kwargs["type"] = whole_number
        elif "-i" in flags:
            kwargs["help"] = "Model or folder of a run to continue in a new folder, with the arguments that it had"
        return super().add_argument(*flags, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """See ``argparse.ArgumentParser``. What the command line does not tell about a run to continue is as it was."""
        self.add_argument("--resume", action="store_true", help="Go on in its folder with the last run of the env, if any")
        self.add_argument("--eval-env", help="Environment ID for evaluations (default: that of the training)")
        self.add_argument("--dataset", help="Data to learn from before the first step: see DeepCRL.load_dataset")
        self.add_argument("--offline-updates", type=int, default=0, help="Number of updates on the data before the first step")
        self.set_defaults(algo="deepcrl", env=DEFAULT_ENV)
        given = super().parse_args(args, argparse.Namespace(env=None))
        for flag, is_given in (("-i", given.trained_agent), ("-uuid", given.uuid)):
            if given.resume and is_given:
                raise ValueError(f"{flag}: --resume goes on in the folder of the last run, leave one of both out")
        if (agent := given.trained_agent) and Path(agent).is_dir():
            if (model_path := RunFolder(agent).model_path) is None:
                raise ValueError(f"-i: there is no model in {agent}, neither a final one nor a checkpoint (`--save-freq`)")
            agent = str(model_path)
        elif agent and not agent.endswith(".zip"):
            raise ValueError(f"-i: {agent} is neither a model (.zip) nor the folder of a run")
        if agent and (run := RunFolder(Path(agent).parent)).params_path is not None:
            of_run = {key: value for key, value in run.args().items() if key not in NOT_CONTINUED}
            packages = [*given.gym_packages, *of_run.get("gym_packages", [])]
            if given.env is not None and find_spec(given.env, packages).id != of_run["env"]:
                # Another task is evaluated on its own env
                of_run = {key: value for key, value in of_run.items() if not key.startswith("eval_env")}
            self.set_defaults(**of_run)
        parsed = super().parse_args(args, namespace)
        parsed.trained_agent = agent
        for name in ("env", "eval_env"):
            if env_id := getattr(parsed, name):
                setattr(parsed, name, find_spec(env_id, parsed.gym_packages).id)
                # A run that is continued, and a process of an env, find it by these
                parsed.gym_packages = list(dict.fromkeys([*parsed.gym_packages, *env_id.split(":")[:-1]]))
        return parsed

    def error(self, message: str) -> Any:
        """See ``argparse.ArgumentParser``. One line is enough."""
        self.exit(2, f"{self.prog}: error: {message}\n" if comes_first("error") else None)


def _prepare_run(script: str, argv: Sequence[str]) -> list[str]:
    """Arguments of a script that loads a model, whose env and defaults are those of this package."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env", default=DEFAULT_ENV)
    parser.add_argument("--algo", default="deepcrl")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    loads = script != "load_from_hub"
    if loads:
        parser.add_argument("--pretrained", action="store_true")
    args, _ = parser.parse_known_args(argv)
    needs_help = {"-h", "--help"} & set(argv)
    if needs_help and loads:
        print("--pretrained: take the agent that comes with sb3_deepcrl, in place of one in a log folder\n")
    spec = find_spec(args.env, args.gym_packages)
    prepared = ["--algo", "deepcrl", "-f", "logs", *argv, "--env", spec.id]
    if pretrained := loads and args.pretrained and not needs_help:
        evaluated = find_spec(RunFolder.pretrained(args.algo, spec.id).args()["eval_env"] or spec.id)
        trained = default_env_kwargs(spec)
        # On the task of its evaluation: in training, a point has another goal once it has reached one, and never a success
        changed = [f"{key}:{value!r}" for key, value in default_env_kwargs(evaluated).items() if value != trained[key]]
        defaults = ["--env-kwargs", *changed] if changed else []
        # Nothing is written into the package
        defaults += ["-o", "videos"] if script == "record_video" else []
        prepared = [*defaults, *(word for word in prepared if word != "--pretrained"), "-f", str(AGENTS)]
    has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    draws = loads and not needs_help and "--no-render" not in argv and str(spec.entry_point).startswith(MUJOCO_ENVS)
    if draws and not has_screen and (script == "enjoy" or not os.environ.get("MUJOCO_GL")):
        # MuJoCo would abort the process
        raise ValueError(
            f"there is no screen to show {spec.id} on: add --no-render, or make a video by `MUJOCO_GL=egl sb3-deepcrl "
            f"record_video --env {spec.id}{' --pretrained' * pretrained}` (egl: Debian's libegl1, or MUJOCO_GL=osmesa: "
            "libosmesa6)"
        )
    return prepared


def _run_plot(script: str, argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--figure", type=Path, help="Save the figure to this file, in place of showing it")
    args, sys.argv[1:] = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
    import matplotlib.pyplot as plt

    if args.figure is not None:
        # It shows nothing, so that the figures are still there afterwards
        plt.switch_backend("Agg")
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
        if not args.figure.parent.exists():
            args.figure.parent.mkdir(parents=True)
    getattr(importlib.import_module("rl_zoo3.plots"), script)()
    for index, number in enumerate(plt.get_fignums() if args.figure else [], start=1):
        target = args.figure if index == 1 else args.figure.with_stem(f"{args.figure.stem}-{index}")
        plt.figure(number).savefig(target, dpi=150)
        plt.close(number)
        print(f"Figure: {target}")


def _prepare_hub() -> None:
    """Let model cards name our commands, and give back a name that RL Zoo 2.9.2 imports, gone in huggingface_sb3 3.2."""
    hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):
        # The private function is what became of it
        vars(hub).update(generate_metadata=lambda *args: hub._generate_metadata(*args).to_dict())
    repocard = importlib.import_module("huggingface_hub.repocard")
    save_metadata = repocard.metadata_save

    def save_card(path: Path, metadata: dict[str, Any]) -> None:
        card = path.read_text(encoding="utf-8").replace("pip install rl_zoo3", 'pip install "sb3-deepcrl[zoo]"')
        path.write_text(card.replace("python -m rl_zoo3.", "sb3-deepcrl "), encoding="utf-8")
        save_metadata(path, metadata)

    # The last that RL Zoo's script does with the card, all of whose functions are in the file that is run
    vars(repocard).update(metadata_save=save_card)


def run(script: str, argv: Sequence[str]) -> RunFolder | None:
    """
    Run one of RL Zoo's scripts.

    :return: The folder of the run that it has trained, if any
    :raises SystemExit: With one line, if something that the user gave cannot be used; with 128 and the number of a signal, if
        one has stopped the training
    """
    end_start()
    rank, _ = connect() if script == "train" else (0, 1)
    if rank > 0:
        # What it would say is said by the first one
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    sys.argv = [f"sb3-deepcrl {script}", *argv]
    managers: list[GoalExperimentManager] = []

    def make_manager(*args: Any, **kwargs: Any) -> GoalExperimentManager:
        managers.append(GoalExperimentManager(*args, **kwargs))
        return managers[-1]

    # What RL Zoo's scripts find under these names while they run
    unsafe_loader = yaml.UnsafeLoader
    vars(yaml).update(UnsafeLoader=RunLoader)
    parsers = SimpleNamespace(ArgumentParser=partial(TrainParser, prog="sb3-deepcrl train"))
    vars(rl_zoo3.train).update(argparse=parsers, ExperimentManager=make_manager, StoreDict=StoreDict)
    vars(rl_zoo3.utils).update(StoreDict=StoreDict)
    numbers: list[int] = []
    try:
        if script == "train":
            # Elsewhere there is nothing to save
            with stopped_by_signals() as numbers:
                rl_zoo3.train.train()
        elif script in PLOTS:
            _run_plot(script, argv)
        else:
            sys.argv[1:] = _prepare_run(script, argv)
            if script == "push_to_hub":
                _prepare_hub()
            runpy.run_module(f"rl_zoo3.{script}", run_name="__main__")
    except KeyboardInterrupt:
        # Before the training or after it
        if not numbers:
            raise
    except Exception as error:
        if not comes_first("error"):
            sys.exit(1)
        if (message := describe_input_error(error) or how_to_write(error, argv)) is None:
            raise
        sys.exit(f"sb3-deepcrl {script}: error: {message}")
    finally:
        vars(yaml).update(UnsafeLoader=unsafe_loader)
    if numbers:
        # As shells do
        sys.exit(128 + numbers[0])
    return RunFolder(managers[-1].save_path) if managers and not managers[-1].optimize_hyperparameters else None


def main(others: Mapping[str, tuple[str, Callable[[Sequence[str]], None]]] | None = None) -> None:
    """
    Run the script that the first argument of the command line names, or one of the other commands.

    :param others: For each other command, a line about it, and what runs it with its arguments
    """
    end_start()
    commands = {script: (line, partial(run, script)) for script, line in SCRIPTS.items()} | dict(others or {})
    parser = argparse.ArgumentParser(
        prog="sb3-deepcrl",
        description="RL Zoo's scripts with DeepCRL. Each has its own --help.",
        epilog="\n".join(["commands:", *(f"  {name:<16}{line}" for name, (line, _) in commands.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sb3-deepcrl {sb3_deepcrl.__version__}")
    parser.add_argument("command", choices=commands, metavar="command", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args()
    commands[args.command][1](args.arguments)
