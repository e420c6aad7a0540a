"""
The commands ``sb3-deepcrl export``, ``distill`` and ``prune``, which take the policy of a run along.
"""

import argparse
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
from rich.console import Console
from rich.table import Table
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from sb3_deepcrl.common.startup import end_start
from sb3_deepcrl.common.utils import WITHOUT_BUFFER, atomic_path, how_to_write, is_for_user, whole_number
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.deploy import Distillation, compare_policies, export_policy
from sb3_deepcrl.deploy.distillation import updates_of_student
from sb3_deepcrl.deploy.export import FORMATS
from sb3_deepcrl.deploy.pruning import policy_kwargs_without_size, pruned_kwargs
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.zoo import launcher
from sb3_deepcrl.zoo.runs import RunFolder, num_timesteps

SUMMARIES = {
    "export": "Write the deterministic policy to a file that needs neither this package nor Stable-Baselines3, or a model.",
    "distill": "Let a shallow student learn from the model of a run. Other arguments as in train.",
    "prune": "Drop residual blocks that contribute little, and learn from the whole model. Other arguments as in train.",
}
# What the student does not take from the config of its teacher
NOT_TAKEN = ("callback", "depth", "width", "n_timesteps", "policy_kwargs")
N_EPISODES = 32


def _find_model(path: Path) -> tuple[Path, RunFolder]:
    """A model and its folder, of which either may be given."""
    if not path.is_dir():
        # An error if it is none
        num_timesteps(path)
        return path, RunFolder(path.parent)
    run = RunFolder(path)
    if run.model_path is None:
        raise ValueError(f"there is no model in {path}, neither a final one nor a checkpoint")
    return run.model_path, run


def _make_env(
    run: RunFolder, path: Path, env_id: str | None, gym_packages: Sequence[str], statistics: Path | None
) -> VecEnv | None:
    """Env of a model, as far as it is known, with its statistics of ``VecNormalize``."""
    env: VecEnv | None = None
    if env_id is not None:
        spec = find_spec(env_id, gym_packages)
        env = DummyVecEnv([lambda: gym.make(spec)])
    elif run.params_path is not None:
        env = run.make_env()
    if statistics is None and run.params_path is not None and run.sibling(path, "vecnormalize").is_file():
        statistics = run.sibling(path, "vecnormalize")
    if statistics is None:
        return env
    loaded = load_from_pkl(statistics)
    if env is None:
        return loaded
    if (vec_normalize := unwrap_vec_normalize(env)) is None:
        loaded.set_venv(env)
        return loaded
    if loaded.norm_obs:
        # Those of a checkpoint are not those of the end
        vec_normalize.obs_rms = loaded.obs_rms
    return env


def _write_model(path: Path, output: Path) -> Path:
    """
    Write a model without what its optimizers have gathered, which is two thirds of it. Learning can go on: they start anew.
    """
    if output.suffix in FORMATS.values():
        raise ValueError(f"{output} has the suffix of another format, that of a model is .zip: change one")
    output = output if output.suffix else output.with_suffix(".zip")
    with atomic_path(output, ".zip") as file, zipfile.ZipFile(path) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("optimizer.pth"):
                state_dict = th.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                buffer = io.BytesIO()
                th.save({**state_dict, "state": {}}, buffer)
                content = buffer.getvalue()
            new.writestr(name, content)
    return output


def _export(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("output", type=Path, help="File to write, such as policy.onnx")
    formats = "torch: a file of torch.export; sb3: the model, without the state of its optimizers"
    parser.add_argument("--format", choices=[*FORMATS, "sb3"], default="onnx", help=formats)
    parser.add_argument("--algo", help="Algorithm (default: that of the run, or deepcrl)")
    parser.add_argument("--env", help="Environment ID, where the model is in no folder of a run")
    parser.add_argument("--gym-packages", nargs="+", default=[], metavar="PACKAGE", help="Modules that register it")
    parser.add_argument("--vec-normalize", type=Path, metavar="FILE", help="Statistics of VecNormalize (default: of the run)")
    args = parser.parse_args(argv)
    path, run = _find_model(args.model)
    if args.format == "sb3":
        if args.algo or args.env or args.vec_normalize:
            raise ValueError("--format sb3 writes the model as it is: leave --algo, --env and --vec-normalize out")
        written = _write_model(path, args.output)
        print(f"Model of {path}: {written}, {written.stat().st_size / 1e6:.1f} MB")
        return
    algo = args.algo or (run.args()["algo"] if run.params_path else "deepcrl")
    if algo not in ALGOS:
        raise ValueError(f"--algo: there is no {algo!r}, use one of {', '.join(ALGOS)}")
    model: BaseAlgorithm = ALGOS[algo].load(path, device="cpu", custom_objects=WITHOUT_BUFFER)
    env = _make_env(run, path, args.env, args.gym_packages, args.vec_normalize)
    written = export_policy(model, args.output, args.format, env)
    print(f"Policy of {path}, {model.num_timesteps:,} env steps: {written}, {written.stat().st_size / 1e6:.1f} MB")


def _learn_from(command: str, parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Train a student by the one program that trains, and show it beside its teacher."""
    is_pruned = command == "prune"
    parser.add_argument("--depth", type=whole_number, default=16 if is_pruned else 8, help="Depth of the student")
    if not is_pruned:
        parser.add_argument("--width", type=whole_number, help="Width of the student (default: that of the teacher)")
    parser.add_argument("-n", "--n-timesteps", type=whole_number, default=250_000, help="Number of env steps of the student")
    parser.add_argument("-f", "--log-folder", default=f"logs/{command}", help="Log folder of the student")
    parser.add_argument("--hyperparams", "-params", nargs="+", default=[], metavar="KEY:VALUE", help="In place of the run's")
    args, others = parser.parse_known_args(argv)
    path, run = _find_model(args.model)
    if run.params_path is None:
        raise ValueError(f"{path} is in no folder of a run, whose settings its student has: use `{command}` in Python")
    of_run, config = run.args(), run.config()
    teacher = ALGOS[of_run["algo"]].load(path, device="cpu", custom_objects=WITHOUT_BUFFER)
    if not isinstance(teacher, DeepCRL):
        raise ValueError(f"{path} is a model of {of_run['algo']}: only DeepCRL has students")
    policy_kwargs = policy_kwargs_without_size(teacher)
    if is_pruned:
        policy_kwargs = pruned_kwargs(teacher, args.depth).get("policy_kwargs", policy_kwargs)
    if classes := [name for name, value in policy_kwargs.items() if not isinstance(value, bool | int | float | str)]:
        raise ValueError(f"`policy_kwargs` of {path} has `{classes[0]}`, which is no plain value: use `{command}` in Python")
    arguments: dict[str, Any] = {"teacher": str(path.absolute()), "prune": is_pruned}
    for name, kind in (("replay_buffer", "replay_buffer"), ("vec_normalize", "vecnormalize")):
        if (file := run.sibling(path, kind)).is_file():
            arguments[name] = str(file.absolute())
    hyperparams = {
        **{name: value for name, value in config.items() if name not in NOT_TAKEN},
        "depth": args.depth,
        "width": getattr(args, "width", None) or teacher.width,
        "normalize_observations": teacher.normalize_observations,
        "policy_kwargs": policy_kwargs,
        "callback": [{f"{Distillation.__module__}.{Distillation.__name__}": arguments}],
    }
    if teacher.transitions_per_update is not None:
        hyperparams["transitions_per_update"] = updates_of_student(teacher.transitions_per_update)
    given = [f"{name}:{value!r}" for name, value in hyperparams.items()] + args.hyperparams
    eval_env = of_run.get("eval_env") or of_run["env"]
    words = ["--env", of_run["env"], "--eval-env", eval_env, "-n", str(args.n_timesteps), "-f", args.log_folder]
    if of_run["gym_packages"]:
        words += ["--gym-packages", *of_run["gym_packages"]]
    for name in ("env_kwargs", "eval_env_kwargs"):
        if values := of_run[name]:
            words += [f"--{name.replace('_', '-')}", *(f"{key}:{value!r}" for key, value in values.items())]
    student_run = launcher.run("train", [*words, *others, "--hyperparams", *given])
    if student_run is None:
        # A search of hyperparameters
        return
    eval_env = student_run.args()["eval_env"]
    student = student_run.load_model()
    assert isinstance(student, DeepCRL)
    rows = compare_policies({"teacher": teacher, "student": student}, student_run.make_env(eval_env), N_EPISODES)
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=f"{N_EPISODES} episodes of {eval_env}")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main(command: str, argv: Sequence[str]) -> None:
    """Run one of the commands."""
    end_start()
    parser = argparse.ArgumentParser(prog=f"sb3-deepcrl {command}", description=SUMMARIES[command])
    parser.add_argument("model", type=Path, metavar="MODEL.zip", help="Model, or folder of a run")
    try:
        if command == "export":
            _export(parser, argv)
        else:
            _learn_from(command, parser, argv)
    except Exception as error:
        message = str(error) if is_for_user(error) else how_to_write(error, argv)
        if message is None:
            raise
        parser.exit(2, f"{parser.prog}: error: {message}\n")
