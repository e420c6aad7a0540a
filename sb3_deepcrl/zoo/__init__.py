"""
DeepCRL in RL Zoo. Importing this package is all that RL Zoo needs to know: the algorithm ``deepcrl``, its hyperparameter
search, the tasks of this package and those of gymnasium-robotics.

The launchers of this package (``python -m sb3_deepcrl.zoo.train``, ...) do it by themselves. For RL Zoo's own ones, put a
file ``custom_envs.py`` with the line ``import sb3_deepcrl.zoo`` where you call them: RL Zoo imports it before it reads
the command line.
"""

try:
    from rl_zoo3 import ALGOS
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
except ImportError as error:
    raise ImportError(f'RL Zoo cannot be imported ({error}): install it with `pip install "sb3_deepcrl[zoo]"`') from error

from gymnasium.envs.registration import WrapperSpec, registry

from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.envs import patch_gymnasium_robotics, register_envs
from sb3_deepcrl.envs.registration import import_gymnasium_robotics
from sb3_deepcrl.zoo.hyperparams_opt import convert_deepcrl_params, sample_deepcrl_params

MAZES = "gymnasium_robotics.envs.maze"
SUCCESS_INFO = WrapperSpec("SuccessInfoWrapper", "sb3_deepcrl.envs.wrappers:SuccessInfoWrapper", kwargs={})


def register() -> None:
    """Register algorithm, hyperparameter search and envs. Calling it again changes nothing."""
    ALGOS["deepcrl"] = DeepCRL
    HYPERPARAMS_SAMPLER["deepcrl"] = sample_deepcrl_params
    HYPERPARAMS_CONVERTER["deepcrl"] = convert_deepcrl_params
    register_envs()
    import_gymnasium_robotics()
    patch_gymnasium_robotics()
    for spec in registry.values():
        # These mazes report `success`. Wrapped here, inside of Monitor, the success rate is in its file too
        if str(spec.entry_point).startswith(MAZES) and SUCCESS_INFO not in spec.additional_wrappers:
            spec.additional_wrappers = (*spec.additional_wrappers, SUCCESS_INFO)


register()
