"""
Reads what is in the folder of a run. Nothing in its YAML files is executed, but ``make_env`` imports the modules that its
``gym_packages`` name.
"""

import ast
import contextlib
import json
import math
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
import yaml
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import ALGOS, create_test_env, get_class_by_name, get_latest_run_id, get_saved_hyperparams
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

import sb3_deepcrl
from sb3_deepcrl.common.utils import WITHOUT_BUFFER
from sb3_deepcrl.env_ids import find_spec

#: Log folder of the trained agents that come with this package
AGENTS = Path(sb3_deepcrl.__file__).parent / "agents"
CHECKPOINT = re.compile(r"rl_model_(\d+)_steps")
# Classes that a config may name
CONFIG_CLASSES = (th.nn.Module, th.optim.Optimizer, BaseBuffer, BaseCallback, BasePolicy, gym.Wrapper, VecEnvWrapper)
CLASS_KEYS = ("callback", "env_wrapper", "policy", "vec_env_wrapper")
# Text that RL Zoo evaluates, functions that it may call, and what else it may be made of
PYTHON_KEYS = ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "monitor_kwargs", "normalize")
DATA_FUNCTIONS = {"dict", "list", "tuple", "float", "int"}
DATA_NODES = (
    *(ast.Expression, ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Call, ast.keyword, ast.Name, ast.Attribute),
    *(ast.UnaryOp, ast.BinOp, ast.unaryop, ast.operator, ast.expr_context),
)


def _is_data(text: str) -> bool:
    """Whether evaluating ``dict(net_arch=[64], activation_fn=nn.ReLU)`` calls nothing but constructors of plain data."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except SyntaxError:
        # Evaluating it will say so
        return True
    names = [getattr(node.func, "id", None) for node in nodes if isinstance(node, ast.Call)]
    return all(isinstance(node, DATA_NODES) for node in nodes) and set(names) <= DATA_FUNCTIONS


def _names_class(entry: Any) -> bool:
    """Whether ``module.Class`` or ``{module.Class: arguments}`` is a class that a config may name."""
    name = next(iter(entry), "") if isinstance(entry, dict) else entry
    if not isinstance(name, str) or "." not in name:
        # A class, which was checked when it was read, or the alias of a policy
        return True
    found = get_class_by_name(name)
    return isinstance(found, type) and issubclass(found, CONFIG_CLASSES)


class RunLoader(yaml.SafeLoader):
    """
    Reads the ``args.yml`` and ``config.yml`` of a run, in place of ``yaml.UnsafeLoader``, which RL Zoo takes. Beyond plain
    data there may be what RL Zoo writes: ``OrderedDict``, tuples, classes, and Python text that calls none of them.
    """

    def get_single_data(self) -> Any:
        """What is in the file. A ValueError tells if it cannot be read, or is more than data."""
        try:
            data = super().get_single_data()
        except yaml.YAMLError as error:
            raise ValueError(f"{self.name} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise ValueError(f"{self.name} cannot be read: it must hold keys and values, got {data!r}")
        for key in PYTHON_KEYS:
            if isinstance(data.get(key), str) and not _is_data(data[key]):
                raise self._refusal(f"`{key}: {data[key]}`")
        for key in CLASS_KEYS:
            entries = data.get(key) or []
            for entry in entries if isinstance(entries, list) else [entries]:
                if not _names_class(entry):
                    raise self._refusal(f"`{key}: {entry}`")
        return data

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"{self.name} holds {what}, which is more than data and could execute anything: write plain data in its place, if "
            "you trust the run"
        )

    def _construct_class(self, name: str, node: yaml.Node) -> type:
        module, _, attribute = name.rpartition(".")
        found = getattr(sys.modules.get(module), attribute, None)
        if not isinstance(found, type) or not issubclass(found, CONFIG_CLASSES):
            raise self._refusal(f"`{name}`")
        return found


TAG = "tag:yaml.org,2002:python/"
RunLoader.add_constructor(
    f"{TAG}object/apply:collections.OrderedDict",
    lambda loader, node: OrderedDict(*loader.construct_sequence(node, deep=True)),
)
RunLoader.add_constructor(f"{TAG}tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True)))
RunLoader.add_multi_constructor(f"{TAG}name:", RunLoader._construct_class)


def num_timesteps(model_path: Path) -> int:
    """Number of env steps that a saved model was trained. A ValueError tells if it is none, or not whole."""
    try:
        with zipfile.ZipFile(model_path) as archive:
            return int(json.loads(archive.read("data"))["num_timesteps"])
    except (OSError, KeyError, zipfile.BadZipFile):
        raise ValueError(f"{model_path} is no model") from None


class RunFolder:
    """
    The folder of a run that :class:`~sb3_deepcrl.zoo.exp_manager.GoalExperimentManager` has trained or trains.

    :param path: The folder, such as ``logs/deepcrl/PointUMaze-v0_1``
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def newest(cls, log_folder: str | Path, algo: str, env_id: str) -> "RunFolder | None":
        """The last run of an algorithm on an env in the folder of all runs, None if there is none."""
        env_name = EnvironmentName(env_id)
        run_id = get_latest_run_id(str(Path(log_folder) / algo), env_name)
        return cls(Path(log_folder) / algo / f"{env_name}_{run_id}") if run_id > 0 else None

    @classmethod
    def pretrained(cls, algo: str, env_id: str) -> "RunFolder":
        """The trained agent for an env that comes with this package. A ValueError lists all of them if it is not there."""
        if (run := cls.newest(AGENTS, algo, env_id)) is None:
            found = ", ".join(sorted(path.stem for path in AGENTS.glob("deepcrl/*/*.zip")))
            raise ValueError(f"no {algo} agent for {env_id} comes with this package, only deepcrl's for {found}: train one")
        return run

    @property
    def params_path(self) -> Path | None:
        """Folder of RL Zoo's ``config.yml`` and ``args.yml``, which has the name of the env; None before they are written."""
        return next((path.parent for path in self.path.glob("*/config.yml") if path.with_name("args.yml").is_file()), None)

    def _read(self, name: str) -> dict[str, Any]:
        if (folder := self.params_path) is None:
            raise ValueError(f"{self.path} is no folder of a run: it has no config.yml in a folder with the name of the env")
        with (folder / name).open() as file:
            return dict(yaml.load(file, Loader=RunLoader))

    def config(self) -> dict[str, Any]:
        """The hyperparameters of the run, ``config.yml``. A ValueError tells if it is not there, or more than data."""
        return self._read("config.yml")

    def args(self) -> dict[str, Any]:
        """The arguments of the command line that started the run, ``args.yml``. A ValueError as in :meth:`config`."""
        return self._read("args.yml")

    def made_with(self) -> list[dict[str, Any]]:
        """What the run was made with: a record for each start, see :func:`~sb3_deepcrl.zoo.provenance.made_with`."""
        path = self.params_path and self.params_path / "made_with.json"
        return json.loads(path.read_text()) if path and path.is_file() else []

    def evaluations(self) -> dict[str, np.ndarray]:
        """The arrays of ``evaluations.npz``, one entry an evaluation; none if there was no evaluation yet."""
        try:
            with np.load(self.path / "evaluations.npz") as file:
                return dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            # Killed while it wrote them
            return {}

    def sibling(self, model_path: Path, kind: str) -> Path:
        """Where the ``"replay_buffer"`` or ``"vecnormalize"`` of a model of this run is, if there is one."""
        if match := CHECKPOINT.fullmatch(model_path.stem):
            return self.path / f"rl_model_{kind}_{match[1]}_steps.pkl"
        if kind == "vecnormalize":
            return (self.params_path or self.path) / "vecnormalize.pkl"
        # The best model is older than the buffer of the final one
        return self.path / ("best_model_replay_buffer.pkl" if model_path.stem == "best_model" else "replay_buffer.pkl")

    @property
    def model_path(self) -> Path | None:
        """The newest whole model, None if there is no model."""
        return self.find_model()

    def find_model(self, before: float = math.inf) -> Path | None:
        """The newest whole model of less than so many env steps, None if there is none."""
        final = [] if self.params_path is None else [self.path / f"{self.params_path.name}.zip"]
        steps: dict[Path, int] = {}
        for path in (*final, *self.path.glob("rl_model_*_steps.zip")):
            with contextlib.suppress(ValueError):
                steps[path] = num_timesteps(path)
        return max((path for path in steps if steps[path] < before), key=steps.__getitem__, default=None)

    @property
    def num_timesteps(self) -> int:
        """Number of env steps of :attr:`model_path`, 0 if there is none."""
        return num_timesteps(self.model_path) if self.model_path else 0

    def load_model(self, env: VecEnv | None = None, before: float = math.inf) -> BaseAlgorithm:
        """
        Load the newest model.

        :param env: Env for the model, needed to train it further
        :param before: The newest of less than so many env steps
        :return: The model
        :raises ValueError: If there is none
        """
        if (path := self.find_model(before)) is None:
            which = "" if before == math.inf else f" of less than {before:,} env steps"
            raise ValueError(f"There is no model{which} in {self.path}, neither a final one nor a checkpoint (`--save-freq`)")
        return ALGOS[self.args()["algo"]].load(path, env=env, custom_objects=WITHOUT_BUFFER if env is None else None)

    def make_env(self, env_id: str | None = None) -> VecEnv:
        """
        Make an env for the model.

        :param env_id: Another env than that of the training
        :return: One env with the arguments, wrappers and statistics of ``VecNormalize`` of the run
        :raises ValueError: If the statistics are not there, or a file is more than data
        """
        # Read here first: RL Zoo would execute whatever it finds
        self.config()
        args = self.args()
        find_spec(args["env"], args.get("gym_packages", ()))
        hyperparams, stats_path = get_saved_hyperparams(str(self.params_path), test_mode=True)
        return create_test_env(
            env_id or args["env"],
            stats_path=stats_path,
            should_render=False,
            hyperparams=hyperparams,
            env_kwargs=args["env_kwargs"],
        )
