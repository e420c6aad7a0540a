import ast
import json
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
import yaml
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_deepcrl.zoo.callbacks import replay_buffers
from sb3_deepcrl.zoo.config import PYTHON_KEYS, ConfigError

CHECKPOINT = re.compile(r"(?P<prefix>.+)_(?P<steps>\d+)_steps")
# Classes that a config may name
CONFIG_CLASSES = (th.nn.Module, th.optim.Optimizer, BaseBuffer, gym.Wrapper, VecEnvWrapper)
# Functions that text in a config may call, and what else it may be made of
DATA_FUNCTIONS = {"dict", "list", "tuple", "float", "int"}
DATA_NODES = (
    *(ast.Expression, ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Call, ast.keyword, ast.Name, ast.Attribute),
    *(ast.UnaryOp, ast.BinOp, ast.unaryop, ast.operator, ast.expr_context),
)


class RunLoader(yaml.SafeLoader):
    """
    Reads the ``args.yml`` and ``config.yml`` of a run, in the place of the unsafe loader of RL Zoo: nothing in them is
    executed. Beyond plain data there may be what RL Zoo writes, which is ``OrderedDict``, tuples, names of classes that have
    been imported, and Python text that calls none of them.
    """

    def get_single_data(self) -> Any:
        """
        :return: What is in the file
        :raises ConfigError: if it is more than data
        """
        data = super().get_single_data()
        for key in PYTHON_KEYS if isinstance(data, dict) else ():
            if isinstance(data.get(key), str) and not is_data(data[key]):
                self.refuse(f"`{key}: {data[key]}`")
        return data

    def refuse(self, what: str) -> Any:
        """
        :param what: Something in the file that could execute code
        :raises ConfigError: always
        """
        raise ConfigError(
            f"{self.name} holds {what}, which is more than data and could execute anything: write plain data in its place, if "
            "you trust the run"
        )

    def construct_class(self, name: str, node: yaml.Node) -> type:
        """
        :param name: Name of a class with its module
        :param node: Where it stands
        :return: The class
        :raises ConfigError: if it is none that a config may name
        """
        module, _, attribute = name.rpartition(".")
        found = getattr(sys.modules.get(module), attribute, None)
        if isinstance(found, type) and issubclass(found, CONFIG_CLASSES):
            return found
        return self.refuse(f"`{name}`")


RunLoader.add_constructor(
    "tag:yaml.org,2002:python/object/apply:collections.OrderedDict",
    lambda loader, node: OrderedDict(*loader.construct_sequence(node, deep=True)),
)
RunLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)
RunLoader.add_multi_constructor("tag:yaml.org,2002:python/name:", RunLoader.construct_class)
RunLoader.add_multi_constructor(
    "tag:yaml.org,2002:python/", lambda loader, suffix, node: loader.refuse(f"`!!python/{suffix}`")
)


def is_data(text: str) -> bool:
    """
    :param text: Python text of a config, such as ``dict(net_arch=[64], activation_fn=nn.ReLU)``
    :return: Whether evaluating it calls nothing but constructors of plain data
    """
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except SyntaxError:
        # Evaluating it will say so
        return True
    return all(isinstance(node, DATA_NODES) for node in nodes) and all(
        isinstance(node.func, ast.Name) and node.func.id in DATA_FUNCTIONS for node in nodes if isinstance(node, ast.Call)
    )


def read_run_file(path: Path) -> dict[str, Any]:
    """
    :param path: ``args.yml`` or ``config.yml`` of a run
    :return: What is in it
    :raises ConfigError: if it cannot be read, or is more than data
    """
    try:
        with path.open() as file:
            data = yaml.load(file, Loader=RunLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} cannot be read: it must hold keys and values, got {data!r}")
    return dict(data)


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
    args = read_run_file(path) if path.is_file() else {}
    return args.get("env_kwargs") or {}
