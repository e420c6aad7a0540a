"""
How an id becomes an environment. It is in no subpackage, as both :mod:`sb3_deepcrl.deepcrl` and
:mod:`sb3_deepcrl.envs` take ids and neither knows the other.
"""

import contextlib
import importlib
from collections.abc import Iterable

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, find_highest_version, get_env_id, parse_env_id, registry


def import_gymnasium_robotics() -> None:
    """
    Import gymnasium-robotics, which registers its environments, without one of the notices that it prints then: that on
    Adroit, whose environments have no goals.
    """
    # Without this package there are no notices
    with contextlib.suppress(ImportError):
        from farama_notifications import notifications

        notices = notifications.get("gymnasium_robotics", {})
        for version in [version for version, text in notices.items() if text.startswith("AdroitHand")]:
            del notices[version]
    importlib.import_module("gymnasium_robotics")


def find_spec(env_id: str, gym_packages: Iterable[str] = ()) -> EnvSpec:
    """
    Find the environment that an id names. All of this package that takes an id finds it here; ``gym.make`` and all that
    builds on it know the ``id`` of the result afterwards.

    Ids may be those of Gymnasium, of this package, of gymnasium-robotics (which is imported if it is needed) and of any
    package that is named, either by ``gym_packages`` or in the id, as in ``"panda_gym:PandaReach-v3"``.

    :param env_id: The id
    :param gym_packages: Modules that register environments when they are imported
    :return: Its specification; its ``id`` names no module
    :raises gymnasium.error.Error: If there is no such environment, or a module cannot be imported
    """
    *modules, name = env_id.split(":")
    if not all(modules):
        raise gym.error.Error(f"{env_id!r} names no module before the colon")
    for module in (*gym_packages, *modules):
        try:
            importlib.import_module(module)
        except ImportError as error:
            message = f"{env_id!r} cannot be found, as the module {module!r} cannot be imported: {error}"
            raise gym.error.UnregisteredEnv(message) from error
    namespace, base, version = parse_env_id(name)
    if name not in registry and find_highest_version(namespace, base) is None:
        import_gymnasium_robotics()
    if version is None:
        # As `gym.make` does
        name = get_env_id(namespace, base, find_highest_version(namespace, base))
    try:
        return gym.spec(name)
    except gym.error.UnregisteredEnv as error:
        hint = "Name the package that registers it if it is another one's, as in 'panda_gym:PandaReach-v3'"
        raise type(error)(f"{error} {hint}") from None
