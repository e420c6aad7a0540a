import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import rl_zoo3.exp_manager
import yaml
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

import sb3_deepcrl
from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.deepcrl.deepcrl import HER_KWARGS
from sb3_deepcrl.deepcrl.policies import SAC_POLICY_KWARGS, DeepCRLPolicy
from sb3_deepcrl.envs.arguments import arguments_of

# What RL Zoo itself takes out of a config
ZOO_KEYS = {
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "noise_std",
    "noise_type",
    "normalize",
    "vec_env_wrapper",
}
# Arguments of the algorithms that have a flag of the command line in place of a key, where there is one
FLAGS = {"device": "--device", "env": "--env", "seed": "--seed", "tensorboard_log": "-tb", "verbose": "--verbose"}
# May be text such as `lin_3e-4`: RL Zoo makes schedules of the first ones, this package of the learning rates of DeepCRL
ZOO_SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "delta_std")
DEEPCRL_SCHEDULES = ("critic_learning_rate", "ent_coef_learning_rate")
SCHEDULES = (*ZOO_SCHEDULES, *DEEPCRL_SCHEDULES)
NOISE_TYPES = ("normal", "ornstein-uhlenbeck")
# Values that may be text to be evaluated
PYTHON_KEYS = ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "monitor_kwargs", "normalize")


class ConfigError(Exception):
    """Something that the user gave cannot be used: one line says what and why."""


def config_folder() -> Path:
    """
    :return: Folder of the configs that come with this package
    """
    package = Path(sb3_deepcrl.__file__).parent
    # Inside of the package where it is installed, beside it in a clone
    installed = package / "zoo_configs"
    return installed if installed.is_dir() else package.parent / "zoo_configs"


def find_config(config: str | None, algo: str, env_id: str) -> str | None:
    """
    :param config: What the user gave: a file, the name of a config of this package (``deepcrl-paper``), a Python module, or
        None
    :param algo: Name of the algorithm
    :param env_id: Id of the env
    :return: Path of the config or Python module, None for the one that comes with RL Zoo
    :raises ConfigError: if there is no such file
    """
    if config is None:
        path = config_folder() / f"{algo}.yml"
        if algo == "deepcrl" or (path.is_file() and env_id in yaml.safe_load(path.read_text())):
            return str(path)
        return None
    if Path(config).is_file():
        return config
    for suffix in ("", ".yml", ".py"):
        if (path := config_folder() / f"{config}{suffix}").is_file():
            return str(path)
    names = sorted(path.stem for path in config_folder().glob("*.*"))
    if config.endswith((".yml", ".yaml", ".py")) or not is_module(config):
        raise ConfigError(
            f"-conf: {config} is neither a file nor a Python module, nor one of the configs of this package, which are "
            f"{', '.join(names)}{suggestion(config, names)}"
        )
    return config


def is_module(name: str) -> bool:
    """
    :param name: Name of a Python module
    :return: Whether there is one
    """
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        # There is no package that it could be in, or it is no name at all
        return False


def check_config_file(config: str, env_id: str) -> None:
    """
    :param config: A config
    :param env_id: Id of the env
    :raises ConfigError: if it is a YAML file that cannot be read, or whose entry for the env has no keys
    """
    if not config.endswith((".yml", ".yaml")):
        return
    try:
        entries = yaml.safe_load(Path(config).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{config}: {error}") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"{config} must have entries by env, such as `{env_id}:` or `default:`, got {entries!r}")
    entry = entries.get(env_id, entries.get("default", {}))
    if not isinstance(entry, dict):
        raise ConfigError(f"{config}: the entry of {env_id} must have keys, such as `n_timesteps`, got {entry!r}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """
    :param name: An unknown name
    :param known: The known ones
    :return: End of a message
    """
    matches = difflib.get_close_matches(name, known, n=1)
    return f", did you mean `{matches[0]}`?" if matches else ""


def argument_names(function: Callable[..., Any]) -> dict[str, Any]:
    """
    :param function: A function or class
    :return: Its arguments with their defaults
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    # A float may have a whole number as its default
    floats = {parameter.name for parameter in parameters if parameter.annotation is float}
    return {name: float(value) if name in floats and isinstance(value, int) else value for name, value in defaults.items()}


def check_hyperparams(hyperparams: dict[str, Any], algo_class: type[BaseAlgorithm]) -> dict[str, Any]:
    """
    Check an entry of a config, so that what is wrong is told by its key.

    :param hyperparams: The entry
    :param algo_class: The algorithm that it is for
    :return: The entry, its text evaluated where it is Python
    :raises ConfigError: if something is wrong
    """
    arguments = argument_names(algo_class)
    for key in hyperparams:
        if key in FLAGS:
            raise ConfigError(f"`{key}` cannot be in a config: use the flag {FLAGS[key]}")
        if key not in ZOO_KEYS and key not in arguments:
            raise ConfigError(f"`{key}` is no hyperparameter{suggestion(key, [*arguments, *ZOO_KEYS])}")
    for key in ("n_timesteps", "policy"):
        if key not in hyperparams:
            raise ConfigError(f"`{key}` is missing")
    check_numbers(hyperparams, arguments)
    hyperparams = evaluate_python(hyperparams)
    check_names(hyperparams, algo_class)
    if issubclass(algo_class, DeepCRL):
        not_of_user = {"observation_space", "action_space", "lr_schedule", "sac_kwargs"}
        policy_keys = (set(argument_names(DeepCRLPolicy)) - not_of_user) | set(SAC_POLICY_KWARGS)
        check_keys(hyperparams, "policy_kwargs", policy_keys)
        not_of_user = {"buffer_size", "observation_space", "action_space", "device", "n_envs", "optimize_memory_usage"}
        buffer_keys = (set(argument_names(ContrastiveReplayBuffer)) - not_of_user) | set(HER_KWARGS)
        # It takes its own buffer in place of HerReplayBuffer
        if hyperparams.get("replay_buffer_class") in (None, ContrastiveReplayBuffer, HerReplayBuffer):
            check_keys(hyperparams, "replay_buffer_kwargs", buffer_keys)
    elif hyperparams.get("replay_buffer_class") is HerReplayBuffer:
        # Others belong to the algorithm
        check_keys(hyperparams, "replay_buffer_kwargs", {*HER_KWARGS, "handle_timeout_termination"})
    if isinstance(hyperparams.get("normalize"), dict):
        check_keys(hyperparams, "normalize", set(argument_names(VecNormalize)) - {"venv"})
    check_keys(hyperparams, "monitor_kwargs", set(argument_names(Monitor)) - {"env", "filename"})
    return hyperparams


def check_numbers(hyperparams: dict[str, Any], arguments: dict[str, Any]) -> None:
    """
    :param hyperparams: An entry of a config
    :param arguments: Arguments of the algorithm with their defaults
    :raises ConfigError: if a number is none
    """
    for key in SCHEDULES:
        value = hyperparams.get(key)
        if isinstance(value, str) and not re.fullmatch(r"lin_[0-9.]+(e-?[0-9]+)?", value):
            raise ConfigError(f"`{key}: {value}` is text: write `!!float {value}`, or `lin_3e-4` for a linear schedule")
    defaults = {**arguments, "n_timesteps": 1.0, "n_envs": 1, "noise_std": 0.1}
    for key, value in hyperparams.items():
        default = defaults.get(key)
        # A train_freq may be a list
        if key in (*SCHEDULES, "train_freq") or isinstance(default, bool) or not isinstance(default, Real):
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            hint = f": write `!!float {value}`" if isinstance(value, str) and "e" in value else ""
            raise ConfigError(f"`{key}` must be a number, got {value!r}{hint}")
        elif isinstance(default, int) and not isinstance(value, int):
            raise ConfigError(f"`{key}` must be an integer, got {value!r}")
    if hyperparams.get("n_envs", 1) < 1:
        raise ConfigError(f"`n_envs` must be at least 1, got {hyperparams['n_envs']}")
    noise_type = hyperparams.get("noise_type")
    if noise_type is not None:
        if not any(known in str(noise_type) for known in NOISE_TYPES):
            raise ConfigError(f"`noise_type: {noise_type}` is unknown, there are {' and '.join(NOISE_TYPES)}")
        if "noise_std" not in hyperparams:
            raise ConfigError("`noise_type` needs `noise_std`")


def evaluate_python(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """
    :param hyperparams: An entry of a config
    :return: The same with text evaluated where it is Python
    :raises ConfigError: if it cannot be evaluated
    """
    evaluated = dict(hyperparams)
    for key in PYTHON_KEYS:
        value = hyperparams.get(key)
        if isinstance(value, str):
            try:
                # With the names that RL Zoo knows there
                evaluated[key] = eval(value, dict(vars(rl_zoo3.exp_manager)))
            except Exception as error:
                raise ConfigError(f"`{key}: {value}` is no valid Python: {error}") from None
    for key in ("policy_kwargs", "replay_buffer_kwargs", "monitor_kwargs", "env_kwargs"):
        if not isinstance(evaluated.get(key, {}), dict):
            raise ConfigError(f"`{key}` must be a dict, got {evaluated[key]!r}")
    for name, value in evaluated.get("policy_kwargs", {}).items():
        if isinstance(value, str) and (name == "activation_fn" or name.endswith("_class")):
            raise ConfigError(f'`policy_kwargs`: `{name}: {value}` is text: write `policy_kwargs: "dict({name}={value})"`')
    return evaluated


def check_names(hyperparams: dict[str, Any], algo_class: type[BaseAlgorithm]) -> None:
    """
    :param hyperparams: An entry of a config
    :param algo_class: The algorithm that it is for
    :raises ConfigError: if the policy, a wrapper or a callback does not exist
    """
    policy = hyperparams["policy"]
    if not isinstance(policy, str) or ("." not in policy and policy not in algo_class.policy_aliases):
        raise ConfigError(f"`policy: {policy}` is unknown{suggestion(str(policy), algo_class.policy_aliases)}")
    if "." in policy:
        load_class("policy", policy)
    elif not issubclass(algo_class, DeepCRL):
        policy_class = arguments_of(algo_class.policy_aliases[policy])
        if not policy_class.takes_others:
            check_keys(hyperparams, "policy_kwargs", policy_class.names)
    for key in ("env_wrapper", "vec_env_wrapper", "callback"):
        entries = hyperparams.get(key) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, dict) and len(entry) != 1:
                raise ConfigError(f"`{key}: {entry}` must have one class with its arguments: check the indentation")
            name, kwargs = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
            if not isinstance(name, str):
                # A Python config may have the class itself, or a callback
                continue
            found = load_class(key, name)
            if key == "callback" and not (isinstance(found, type) and issubclass(found, BaseCallback)):
                raise ConfigError(f"`callback: {name}` is no callback: it must be a subclass of {BaseCallback.__name__}")
            known = arguments_of(found)
            if not known.takes_others:
                check_keys({f"{key}: {name}": kwargs}, f"{key}: {name}", known.names)


def is_missing(error: Exception, module: str) -> bool:
    """
    :param error: What the import of a module has raised
    :param module: Its name
    :return: Whether there is no such module, and not something wrong in it
    """
    return isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")


def load_class(key: str, name: str) -> Any:
    """
    :param key: Key of a config
    :param name: Module and name of a class
    :return: The class
    :raises ConfigError: if there is none of that name. What goes wrong in its module is raised as it is.
    """
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise ConfigError(f"`{key}: {name}` cannot be imported: write its module too, such as `my_module.{name}`")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if not is_missing(error, module_name):
            raise
        raise ConfigError(f"`{key}: {name}` cannot be imported: {error}") from None
    if not hasattr(module, class_name):
        raise ConfigError(f"`{key}: {name}` cannot be imported: module {module_name} has no `{class_name}`")
    return getattr(module, class_name)


def check_keys(hyperparams: dict[str, Any], key: str, known: Iterable[str]) -> None:
    """
    :param hyperparams: An entry of a config
    :param key: Key of a dict in it
    :param known: Keys that this dict may have
    :raises ConfigError: if it has another one
    """
    for name in hyperparams.get(key) or {}:
        if name not in known:
            raise ConfigError(f"`{key}` has no `{name}`{suggestion(name, known)}")
