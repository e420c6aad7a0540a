"""
DeepCRL in RL Zoo. Importing this package is all that RL Zoo needs to know: the algorithm ``deepcrl``, its hyperparameter
search, the tasks of this package and those of gymnasium-robotics, and the configs of this package.

``python -m sb3_deepcrl.zoo`` does it by itself. For RL Zoo's own commands, put a file ``custom_envs.py`` with the line
``import sb3_deepcrl.zoo`` where you call them: RL Zoo imports it before it reads the command line.
"""

try:
    import rl_zoo3.exp_manager as rl_zoo3_manager
    from rl_zoo3 import ALGOS
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
except ImportError as error:
    # With the name of this package `python -m` prints the line alone
    message = f'RL Zoo cannot be imported ({error}): install the extra "zoo", in a clone by `pip install -e ".[zoo]"`'
    raise ImportError(message, name=__name__) from None

from gymnasium.envs.registration import WrapperSpec, registry

from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.env_ids import import_gymnasium_robotics
from sb3_deepcrl.envs import register_envs
from sb3_deepcrl.zoo.hyperparams_opt import convert_deepcrl_params, sample_deepcrl_params

MAZES = "gymnasium_robotics.envs.maze"
SUCCESS_INFO = WrapperSpec("SuccessInfoWrapper", "sb3_deepcrl.envs.wrappers:SuccessInfoWrapper", kwargs={})


def register() -> None:
    """Register algorithm, hyperparameter search, experiment manager and envs. Calling it again changes nothing."""
    ALGOS["deepcrl"] = DeepCRL
    HYPERPARAMS_SAMPLER["deepcrl"] = sample_deepcrl_params
    HYPERPARAMS_CONVERTER["deepcrl"] = convert_deepcrl_params
    register_envs()
    import_gymnasium_robotics()
    for spec in registry.values():
        # These mazes report `success`. Wrapped here, inside of Monitor, the success rate is in its file too
        if str(spec.entry_point).startswith(MAZES) and SUCCESS_INFO not in spec.additional_wrappers:
            spec.additional_wrappers = (*spec.additional_wrappers, SUCCESS_INFO)
    # Without it the module of RL Zoo is being imported, by a script that trains nothing: `train` imports this one first
    if hasattr(rl_zoo3_manager, "ExperimentManager"):
        from sb3_deepcrl.zoo.callbacks import make_trial_callback
        from sb3_deepcrl.zoo.exp_manager import GoalExperimentManager

        vars(rl_zoo3_manager).update(ExperimentManager=GoalExperimentManager, TrialEvalCallback=make_trial_callback)


register()
