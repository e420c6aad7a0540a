import json
import re
import zipfile
from pathlib import Path
from typing import Any

import yaml

from sb3_deepcrl.zoo.callbacks import replay_buffers
from sb3_deepcrl.zoo.config import ConfigError

CHECKPOINT = re.compile(r"(?P<prefix>.+)_(?P<steps>\d+)_steps")


def sibling(model_path: Path, kind: str) -> Path:
    """
    :param model_path: Path of a model in the folder of a run
    :param kind: "replay_buffer" or "vecnormalize"
    :return: Where the file that belongs to it is, if there is one
    """
    match = CHECKPOINT.fullmatch(model_path.stem)
    if match is None:
        # Of the final model; RL Zoo puts the statistics of VecNormalize in the folder of the config
        folder = run_config(model_path) if kind == "vecnormalize" else model_path.parent
        return (folder or model_path.parent) / f"{kind}.pkl"
    return model_path.with_name(f"{match['prefix']}_{kind}_{match['steps']}_steps.pkl")


def run_config(model_path: Path) -> Path | None:
    """
    :param model_path: Path of a model
    :return: Folder with the ``config.yml`` and ``args.yml`` of its run, None if there is none
    """
    configs = list(model_path.parent.glob("*/config.yml"))
    return configs[0].parent if len(configs) == 1 and configs[0].with_name("args.yml").is_file() else None


def is_whole(path: Path) -> bool:
    """
    :param path: Path of a model
    :return: Whether the file is complete
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return "data" in archive.namelist()
    except zipfile.BadZipFile:
        return False


def num_timesteps(path: Path) -> int:
    """
    :param path: Path of a model
    :return: Number of env steps that it was trained for
    """
    with zipfile.ZipFile(path) as archive:
        return int(json.loads(archive.read("data"))["num_timesteps"])


def find_model(path: str) -> str:
    """
    Choose where a run goes on.

    :param path: A model, or the folder of a run: the newest model is taken that has its replay buffer, or the newest one if
        the run has saved no replay buffer
    :return: Path of a model
    :raises ConfigError: if there is none
    """
    if not Path(path).is_dir():
        if not Path(path).is_file() or not is_whole(Path(path)):
            raise ConfigError(f"-i: {path} is neither a model (.zip) nor the folder of a run")
        return path
    folder = Path(path)
    config = run_config(folder / "any.zip")
    final = [] if config is None else [folder / f"{config.name}.zip"]
    models = [model for model in (*final, *folder.glob("rl_model_*_steps.zip")) if model.is_file() and is_whole(model)]
    if not models:
        raise ConfigError(f"-i: there is no model in {path}, neither a final one nor a checkpoint (`--save-freq`)")
    if replay_buffers(folder) or (folder / "replay_buffer.pkl").is_file():
        models = [model for model in models if sibling(model, "replay_buffer").is_file()] or models
    return str(max(models, key=num_timesteps))


def saved_env_kwargs(config: Path) -> dict[str, Any]:
    """
    :param config: Folder with the ``args.yml`` of a run
    :return: Arguments of its env
    """
    path = config / "args.yml"
    # Written by RL Zoo as OrderedDict, and read by it like this
    args = yaml.load(path.read_text(), Loader=yaml.UnsafeLoader) if path.is_file() else {}
    return args.get("env_kwargs") or {}
