"""
What a run is made with, besides its own settings: code, machine, and defaults.
"""

import functools
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_deepcrl
from sb3_deepcrl.common.torch_layers import ResidualTower

PACKAGE = Path(sb3_deepcrl.__file__).parent
# Where in this package the code is that decides what comes out of a run
CODE = ("common", "deepcrl", "envs", "env_ids.py", "analysis/runs.py")
DEPENDENCIES = ("torch", "stable-baselines3", "sb3-contrib", "gymnasium", "gymnasium-robotics", "mujoco", "numpy")


def code() -> dict[str, str | None]:
    """
    :return: Version of this package, its git revision where there is one, and a digest of its source. The latter is that of
        the files when it is first asked for.
    """
    return {"version": sb3_deepcrl.__version__, "revision": revision(), "source": source_digest()}


@functools.cache
def source_digest() -> str:
    """
    :return: Digest of the code that decides what comes out of a run
    """
    paths = {path for part in CODE for path in (PACKAGE / part, *(PACKAGE / part).rglob("*"))}
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in (".py", ".cpp")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{path.read_text(encoding='utf-8')}\0".encode())
    return digest.hexdigest()[:10]


@functools.cache
def revision() -> str | None:
    """
    :return: The last commit that changed this package, with a "+" if it was changed since; None if it is in no repository
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments, "--", "."]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Nothing if the package is installed in somebody else's repository, which does not know it
        commit = git("log", "-1", "--format=%h")
        return f"{commit}+" if commit and git("status", "--porcelain") else commit or None
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def processor() -> str:
    """
    :return: Model of the processor
    """
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def n_usable_cores() -> int:
    """
    :return: Number of cores that this process may use
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dependencies() -> dict[str, str]:
    """
    :return: Versions of the packages that a run depends on
    """
    versions = {"python": platform.python_version()}
    for name in DEPENDENCIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # With the platform that it was built for
    return {**versions, "torch": th.__version__}


def machine(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: A model
    :return: What it is trained on in this process
    """
    is_low = any(tower.autocast_dtype for tower in model.policy.modules() if isinstance(tower, ResidualTower))
    return {
        "processor": processor(),
        "cores": n_usable_cores(),
        "gpu": th.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "threads": th.get_num_threads(),
        "precision": "bfloat16" if is_low else "float32",
    }


def plain(value: Any) -> Any:
    """
    :param value: Any object
    :return: What JSON has in its place, the same in each process
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        # Those of NumPy are among them
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
