import importlib.util
import traceback
from pathlib import Path

import yaml

import sb3_deepcrl
from sb3_deepcrl.common.utils import is_for_user


def config_folder() -> Path:
    """Folder of the configs that come with this package."""
    package = Path(sb3_deepcrl.__file__).parent
    # Inside of the package where it is installed, beside it in a clone
    installed = package / "zoo_configs"
    return installed if installed.is_dir() else package.parent / "zoo_configs"


def find_config(config: str | None, algo: str, env_id: str) -> str | None:
    """
    Find the config that the command line asks for.

    :param config: A file, the name of a config of this package (``deepcrl-paper``), a Python module, or None
    :return: Path of the config or Python module, None for the one that comes with RL Zoo
    """
    if config is None:
        path = config_folder() / f"{algo}.yml"
        has_entry = path.is_file() and (algo == "deepcrl" or env_id in yaml.safe_load(path.read_text()))
        return str(path) if has_entry else None
    if Path(config).is_file():
        return config
    if (path := config_folder() / f"{config.removesuffix('.yml')}.yml").is_file():
        return str(path)
    if not config.endswith((".yml", ".yaml", ".py")) and _is_module(config):
        return config
    raise ValueError(
        f"-conf: {config} is neither a file nor a Python module, nor one of the configs of this package, which are "
        f"{', '.join(sorted(path.stem for path in config_folder().glob('*.yml')))}"
    )


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        # There is no package that it could be in, or it is no name at all
        return False


def describe_input_error(error: BaseException) -> str | None:
    """What is wrong in a config or on the command line, in one line; None for a bug, which is found by its traceback."""
    message = " ".join(str(error).split())
    if is_for_user(error) or isinstance(error, yaml.YAMLError):
        return message
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    # Where it went wrong
    file, module = frames[-1].f_code.co_filename, frames[-1].f_globals.get("__name__", "")
    package = module.partition(".")[0]
    if hasattr(error, "__notes__"):
        return None
    if file == "<string>" and frames[-2].f_code.co_name != "read_hyperparameters":
        # RL Zoo evaluates the values of some options
        return f"{message}: values are Python, in which text has quotes, as in policy:\"'MlpPolicy'\""
    if isinstance(error, TypeError) and "keyword argument" in message and package in ("stable_baselines3", "sb3_contrib"):
        return message
    if package == "rl_zoo3" or module == "importlib._bootstrap":
        # It takes the values as they are, and imports the modules that they name
        return f"{message} is missing" if isinstance(error, KeyError) else message
    return None
