import importlib.util
from pathlib import Path

import yaml

import sb3_deepcrl


def config_folder() -> Path:
    """
    Find the configs that come with this package.

    :return: Their folder
    """
    package = Path(sb3_deepcrl.__file__).parent
    # Inside of the package where it is installed, beside it in a clone
    installed = package / "zoo_configs"
    return installed if installed.is_dir() else package.parent / "zoo_configs"


def find_config(config: str | None, algo: str, env_id: str) -> str | None:
    """
    Find the config that the command line asks for.

    :param config: A file, the name of a config of this package (``deepcrl-paper``), a Python module, or None
    :param algo: Name of the algorithm
    :param env_id: Id of the env
    :return: Path of the config or Python module, None for the one that comes with RL Zoo
    :raises ValueError: If there is none
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
