"""
The names by which algorithms know their deep policies.
"""

import warnings

from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_deepcrl.deep_policies import policies as deep

NAMES = ("DeepMlpPolicy", "DeepCnnPolicy", "DeepMultiInputPolicy")
_TD3 = (deep.DeepTD3Policy, deep.DeepTD3CnnPolicy, deep.DeepTD3MultiInputPolicy)
_ACTOR_CRITIC = (deep.DeepActorCriticPolicy, deep.DeepActorCriticCnnPolicy, deep.DeepMultiInputActorCriticPolicy)

#: Deep policies by algorithm, in the order of ``NAMES``
POLICIES: dict[type[BaseAlgorithm], tuple[type[BasePolicy], ...]] = {
    SAC: (deep.DeepSACPolicy, deep.DeepSACCnnPolicy, deep.DeepSACMultiInputPolicy),
    TD3: _TD3,
    DDPG: _TD3,
    DQN: (deep.DeepDQNPolicy, deep.DeepDQNCnnPolicy, deep.DeepDQNMultiInputPolicy),
    PPO: _ACTOR_CRITIC,
    A2C: _ACTOR_CRITIC,
}

try:
    from sb3_contrib import QRDQN, TQC, TRPO, CrossQ

    from sb3_deepcrl.deep_policies import contrib_policies as contrib
except ModuleNotFoundError:
    pass
except (ImportError, AttributeError, TypeError) as error:
    warnings.warn(f"No deep policies for sb3-contrib ({error}): they need `pip install 'sb3-contrib>=2.9'`")
else:
    POLICIES |= {
        TQC: (contrib.DeepTQCPolicy, contrib.DeepTQCCnnPolicy, contrib.DeepTQCMultiInputPolicy),
        # CrossQ itself has no policies for images and Dict observations
        CrossQ: (contrib.DeepCrossQPolicy,),
        QRDQN: (contrib.DeepQRDQNPolicy, contrib.DeepQRDQNCnnPolicy, contrib.DeepQRDQNMultiInputPolicy),
        TRPO: _ACTOR_CRITIC,
    }


def register_policies() -> None:
    """
    Add ``"DeepMlpPolicy"``, ``"DeepCnnPolicy"`` and ``"DeepMultiInputPolicy"`` to the policies that the algorithms of
    Stable-Baselines3 know by name, and to those of sb3-contrib if it is installed. Importing ``sb3_deepcrl`` does it. Names
    that somebody else has taken are left alone, with a warning.
    """
    for algorithm, policies in POLICIES.items():
        for name, policy in zip(NAMES, policies, strict=False):
            taken = algorithm.policy_aliases.setdefault(name, policy)
            if taken is not policy:
                warnings.warn(
                    f"{algorithm.__name__} has another policy named {name} already, {taken.__module__}.{taken.__name__}: "
                    f"use the class {policy.__module__}.{policy.__name__} instead of the name"
                )


def unregister_policies() -> None:
    """
    Undo :func:`register_policies`. Models that have these policies keep them, and can still be saved and loaded.
    """
    for algorithm, policies in POLICIES.items():
        for name, policy in zip(NAMES, policies, strict=False):
            if algorithm.policy_aliases.get(name) is policy:
                del algorithm.policy_aliases[name]
