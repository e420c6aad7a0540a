"""
What a run is made with: code, machine and all arguments, defaults included.
"""

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

import sb3_deepcrl
from sb3_deepcrl.common.torch_layers import residual_towers
from sb3_deepcrl.common.utils import processor
from sb3_deepcrl.envs.arguments import default_arguments, default_env_kwargs

PACKAGE = Path(sb3_deepcrl.__file__).parent
# Where the code is that decides what comes out of a run
CODE = ("common", "deep_policies", "deepcrl", "deploy", "envs", "tensor_envs", "env_ids.py", "zoo/exp_manager.py")
DEPENDENCIES = (
    *("torch", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "gymnasium-robotics", "mujoco"),
    *("mujoco_warp", "numpy"),
)
# Arguments of algorithms, and entries of configs, that say nothing about what is learned, or name folders
OTHER_ARGUMENTS = ("_init_setup_model", "callback", "device", "env", "n_timesteps", "seed", "tensorboard_log", "verbose")


@functools.cache
def source_digest() -> str:
    """Digest of the source that decides what comes out of a run: it may be in no repository, or edited."""
    paths = {path for part in CODE for path in (PACKAGE / part, *(PACKAGE / part).rglob("*"))}
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in (".py", ".cpp")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{path.read_text(encoding='utf-8')}\0".encode())
    return digest.hexdigest()[:10]


@functools.cache
def revision() -> str | None:
    """The last commit that changed this package, with a "+" if it was edited since; None if it is in no repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments, "--", "."]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Nothing if the package is installed in somebody else's repository, which does not know it
        commit = git("log", "-1", "--format=%h")
        return f"{commit}+" if commit and git("status", "--porcelain") else commit or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _packages() -> dict[str, str]:
    installed = {name: next(iter(metadata.distributions(name=name)), None) for name in DEPENDENCIES}
    versions = {name: distribution.version for name, distribution in installed.items() if distribution}
    # The version of PyTorch with the platform that it was built for
    return {"python": platform.python_version(), **versions, "torch": th.__version__}


def _plain(value: Any) -> Any:
    """What JSON has in place of an object, the same in each process."""
    if isinstance(value, np.generic):
        return value.item()
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _arguments(
    model: BaseAlgorithm, hyperparams: Mapping[str, Any], envs: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    given = {**default_arguments(type(model)), "n_envs": model.n_envs, **hyperparams}
    found: dict[str, Any] = {}
    for name, value in given.items():
        # A model that was loaded has brought its own, and others are chosen
        own = getattr(model, name, value)
        if name not in OTHER_ARGUMENTS and not name.endswith("_kwargs"):
            found[name] = own if isinstance(own, bool | int | float | str | None) else value
    owners: dict[str, type] = {"policy_kwargs": model.policy_class}
    if isinstance(model, OffPolicyAlgorithm):
        owners["replay_buffer_kwargs"] = type(model.replay_buffer)
    for key, owner in owners.items():
        # What is an argument of the algorithm too comes from there
        defaults = {name: value for name, value in default_arguments(owner).items() if name not in given}
        found |= {f"{key}.{name}": value for name, value in {**defaults, **(getattr(model, key, None) or {})}.items()}
    for name, (env_id, env_kwargs) in envs.items():
        spec = gym.spec(env_id)
        values = {"id": env_id, "entry_point": spec.entry_point, **default_env_kwargs(spec), **env_kwargs}
        found |= {f"{name}.{key}": value for key, value in values.items()}
    if model.env is not None:
        found["env.vec_env"] = type(model.env.unwrapped).__name__
    return found


def made_with(
    model: BaseAlgorithm, hyperparams: Mapping[str, Any], envs: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """
    Describe what a run is made with from now on.

    :param model: The model
    :param hyperparams: The entry of a config that it was made with
    :param envs: Id and arguments of its envs, by name
    :return: The record in ``made_with.json``. Its ``arguments`` include defaults, each under a name such as ``gamma``,
        ``policy_kwargs.norm`` or ``eval_env.maze``.
    """
    is_low = any(tower.autocast_dtype for tower in residual_towers(model.policy))
    runner = getattr(model, "_runner", None)
    return {
        "num_timesteps": model.num_timesteps,
        "version": sb3_deepcrl.__version__,
        "revision": revision(),
        "source": source_digest(),
        "packages": _packages(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": th.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "threads": th.get_num_threads(),
        "precision": "bfloat16" if is_low else "tf32" if runner is not None and runner._tf32 else "float32",
        "arguments": json.loads(json.dumps(_arguments(model, hyperparams, envs), default=_plain, skipkeys=True)),
    }
