"""
Deep residual policies for the algorithms of Stable-Baselines3: its own policies, whose hidden layers are residual towers.

The ones for sb3-contrib are in ``contrib_policies.py``, so that nothing here needs it.
"""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BaseModel,
    BasePolicy,
    ContinuousCritic,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn import policies as dqn
from stable_baselines3.sac import policies as sac
from stable_baselines3.td3 import policies as td3
from torch import nn

from sb3_deepcrl.common.policies import CheckedPolicy
from sb3_deepcrl.common.torch_layers import Norm, ResidualTower, make_activation
from sb3_deepcrl.common.utils import check_depth, check_policy_kwargs, check_positive_int
from sb3_deepcrl.import_hook import ImportHook


def split_settings(names: Sequence[str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    :param names: Names of the networks of a policy, e.g. ``("pi", "qf")``
    :param settings: Arguments of :class:`~sb3_deepcrl.common.torch_layers.ResidualTower`, each a value for all networks
        or a dict with one value for each of them
    :return: For each network the arguments of its tower
    :raises ValueError: if such a dict has other keys than the names, or if a value is out of its range
    """
    towers: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting, value in settings.items():
        separate = isinstance(value, Mapping)
        if separate and (len(names) == 1 or set(value) != set(names)):
            keys = " and ".join(f"{name!r}" for name in names)
            fix = f"or a dict with the keys {keys}" if len(names) > 1 else "as this policy has a single network"
            raise ValueError(f"`{setting}` must be one value {fix}, got {value!r}")
        for name in names:
            towers[name][setting] = value[name] if separate else value
            label = f"{setting}[{name!r}]" if separate else setting
            if setting == "depth":
                check_depth(towers[name][setting], label)
            elif setting == "width":
                check_positive_int(towers[name][setting], label)
            elif setting == "activation_fn":
                make_activation(towers[name][setting])
    return towers


def deepen(network: nn.Sequential, tower_kwargs: dict[str, Any]) -> None:
    """
    Replace the hidden layer of a network by a residual tower, in place. What is around it stays: the head,
    a squashing of its outputs, batch normalization.

    :param network: A network with one hidden layer of the width of the tower: a Dense layer and an activation
    :param tower_kwargs: Keyword arguments of :class:`~sb3_deepcrl.common.torch_layers.ResidualTower`
    """
    index, hidden = next((index, layer) for index, layer in enumerate(network) if isinstance(layer, nn.Linear))
    network[index] = ResidualTower(hidden.in_features, None, **tower_kwargs)
    del network[index + 1]


class DeepNetwork(BaseModel):
    """
    What the deep networks of all algorithms share. To be put before the class of Stable-Baselines3 in the list of bases,
    which builds a network with one hidden layer.

    :param args: Positional arguments of that class
    :param tower_kwargs: Keyword arguments of :class:`~sb3_deepcrl.common.torch_layers.ResidualTower`
    :param kwargs: Keyword arguments of that class
    """

    #: Attribute with the network, or the list of networks, whose hidden layer becomes a tower
    network_name: ClassVar[str]

    def __init__(self, *args: Any, tower_kwargs: dict[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tower_kwargs = tower_kwargs
        networks = getattr(self, self.network_name)
        for network in [networks] if isinstance(networks, nn.Sequential) else networks:
            deepen(network, tower_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "tower_kwargs": self.tower_kwargs}


class DeepPolicy(CheckedPolicy):
    """
    What the deep policies of all algorithms share. To be put before the policy of Stable-Baselines3 in the list of bases.

    ``depth``, ``width``, ``activation_fn``, ``norm``, ``residual`` and ``residual_scale`` are each one value for all
    networks, or a dict with one for actor and critic: with the keys ``pi`` and ``qf`` for off-policy algorithms, ``pi``
    and ``vf`` for on-policy ones, e.g. ``depth=dict(pi=16, qf=64)``. DQN and QR-DQN have one network, so one value.

    ``compile_blocks(model.policy)`` compiles the towers, see :func:`~sb3_deepcrl.common.compilation.compile_blocks`. It is
    not saved, and ``uncompile_blocks`` undoes it. TRPO needs second derivatives, which ``torch.compile`` does not have: where
    it does the blocks, only the critic can be compiled, ``compile_blocks(model.policy.mlp_extractor.value_net)``.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param depth: Number of Dense layers inside the residual blocks, a positive multiple of 4
        (the first and the last layer are not counted)
    :param width: Number of units of every hidden layer
    :param activation_fn: Activation function
    :param norm: Normalization after each hidden Dense layer, ``"layer"`` or ``"none"``
    :param residual: Whether the blocks add the identity (False for the ablation)
    :param residual_scale: Factor of the residual branches: a number, ``"1/N"`` for one over the number of blocks or
        ``"learnable"`` for one parameter a block that starts there,
        see :class:`~sb3_deepcrl.common.torch_layers.ResidualTower`
    :param net_arch: Not used, with a warning: the networks are set by ``depth`` and ``width``
    :param kwargs: The other arguments of the policy of Stable-Baselines3, which mean there what they mean here
    :raises ValueError: if an argument is out of its range
    """

    #: Names of the towers, as in ``net_arch``
    tower_names: ClassVar[tuple[str, ...]] = ("pi", "qf")

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        depth: int | dict[str, int] = 16,
        width: int | dict[str, int] = 256,
        activation_fn: type[nn.Module] | dict[str, type[nn.Module]] = nn.SiLU,
        norm: Norm | dict[str, Norm] = "layer",
        residual: bool | dict[str, bool] = True,
        residual_scale: float | str | dict[str, float | str] = "learnable",
        net_arch: list[int] | dict[str, list[int]] | None = None,
        **kwargs: Any,
    ):
        if net_arch is not None:
            warnings.warn(
                f"`policy_kwargs` has `net_arch={net_arch}`, which deep policies do not use: "
                "their networks are residual towers, set by `depth` and `width`"
            )
        check_policy_kwargs(kwargs)
        # Needed by `_build()`, which the policies of Stable-Baselines3 call at the end of their constructors
        self.tower_settings = dict(
            depth=depth,
            width=width,
            activation_fn=activation_fn,
            norm=norm,
            residual=residual,
            residual_scale=residual_scale,
        )
        self.tower_kwargs = split_settings(self.tower_names, self.tower_settings)
        # One hidden layer, which a tower replaces
        widths = {name: [tower["width"]] for name, tower in self.tower_kwargs.items()}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=widths if len(widths) > 1 else widths[self.tower_names[0]],
            activation_fn=self.tower_kwargs[self.tower_names[0]]["activation_fn"],
            **kwargs,
        )
        if isinstance(observation_space, spaces.Dict) and issubclass(self.features_extractor_class, FlattenExtractor):
            raise ValueError("You must use `DeepMultiInputPolicy` when working with dict observation space, not DeepMlpPolicy")

    def _make_network(
        self,
        network_class: type[DeepNetwork],
        name: str,
        net_kwargs: dict[str, Any],
        features_extractor: BaseFeaturesExtractor | None = None,
    ) -> Any:
        net_kwargs = self._update_features_extractor(net_kwargs, features_extractor)
        return network_class(**net_kwargs, tower_kwargs=self.tower_kwargs[name]).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        del data["net_arch"]
        data.update(self.tower_settings)
        if hasattr(self, "share_features_extractor"):
            # Not all policies of Stable-Baselines3 save it
            data["share_features_extractor"] = self.share_features_extractor
        return data


class DeepContinuousPolicy(DeepPolicy):
    """
    What the deep policies of SAC, TD3, DDPG, TQC and CrossQ share: an actor and Q-networks of their own.
    """

    actor_class: ClassVar[type[DeepNetwork]]
    critic_class: ClassVar[type[DeepNetwork]]
    actor_kwargs: dict[str, Any]
    critic_kwargs: dict[str, Any]

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """
        :param features_extractor: Features extractor, a new one by default
        :return: A new actor
        """
        return self._make_network(self.actor_class, "pi", self.actor_kwargs, features_extractor)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """
        :param features_extractor: Features extractor, a new one by default
        :return: New Q-networks
        """
        return self._make_network(self.critic_class, "qf", self.critic_kwargs, features_extractor)


# --- SAC ------------------------------------------------------------------------------------------------------------------


class DeepSACActor(DeepNetwork, sac.Actor):
    """
    Actor of SAC with a residual tower.
    """

    network_name = "latent_pi"


class DeepContinuousCritic(DeepNetwork, ContinuousCritic):
    """
    Critics of SAC, TD3 and DDPG, each a residual tower.
    """

    network_name = "q_networks"


class DeepSACPolicy(DeepContinuousPolicy, sac.SACPolicy):
    """
    Deep residual policy for SAC: two towers for the critics and one for the actor, see :class:`DeepPolicy`.
    """

    actor_class = DeepSACActor
    critic_class = DeepContinuousCritic


class DeepSACCnnPolicy(DeepSACPolicy, sac.CnnPolicy):
    """
    Deep residual policy for SAC and images, see :class:`DeepPolicy`.
    """


class DeepSACMultiInputPolicy(DeepSACPolicy, sac.MultiInputPolicy):
    """
    Deep residual policy for SAC and Dict observations, see :class:`DeepPolicy`.
    """


# --- TD3 and DDPG ---------------------------------------------------------------------------------------------------------


class DeepTD3Actor(DeepNetwork, td3.Actor):
    """
    Actor of TD3 and DDPG with a residual tower.
    """

    network_name = "mu"


class DeepTD3Policy(DeepContinuousPolicy, td3.TD3Policy):
    """
    Deep residual policy for TD3 and DDPG, see :class:`DeepPolicy`.
    """

    actor_class = DeepTD3Actor
    critic_class = DeepContinuousCritic


class DeepTD3CnnPolicy(DeepTD3Policy, td3.CnnPolicy):
    """
    Deep residual policy for TD3, DDPG and images, see :class:`DeepPolicy`.
    """


class DeepTD3MultiInputPolicy(DeepTD3Policy, td3.MultiInputPolicy):
    """
    Deep residual policy for TD3, DDPG and Dict observations, see :class:`DeepPolicy`.
    """


# --- DQN ------------------------------------------------------------------------------------------------------------------


class DeepQNetwork(DeepNetwork, dqn.QNetwork):
    """
    Q-network of DQN with a residual tower.
    """

    network_name = "q_net"


class DeepDQNPolicy(DeepPolicy, dqn.DQNPolicy):
    """
    Deep residual policy for DQN, see :class:`DeepPolicy`.
    """

    tower_names = ("qf",)

    def make_q_net(self) -> DeepQNetwork:
        """
        :return: A new Q-network
        """
        return self._make_network(DeepQNetwork, "qf", self.net_args)


class DeepDQNCnnPolicy(DeepDQNPolicy, dqn.CnnPolicy):
    """
    Deep residual policy for DQN and images, see :class:`DeepPolicy`.
    """


class DeepDQNMultiInputPolicy(DeepDQNPolicy, dqn.MultiInputPolicy):
    """
    Deep residual policy for DQN and Dict observations, see :class:`DeepPolicy`.
    """


# --- PPO, A2C and TRPO ----------------------------------------------------------------------------------------------------


class DeepActorCriticPolicy(DeepPolicy, ActorCriticPolicy):
    """
    Deep residual policy for PPO, A2C and TRPO, see :class:`DeepPolicy`.

    Orthogonal initialization (``ortho_init``) is that of features extractor and heads. The towers start as they do
    everywhere else: at outputs of the same size whatever the depth.
    """

    tower_names = ("pi", "vf")

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        deepen(self.mlp_extractor.policy_net, self.tower_kwargs["pi"])
        deepen(self.mlp_extractor.value_net, self.tower_kwargs["vf"])

    def _build(self, lr_schedule: Schedule) -> None:
        # Everything but the towers is initialised as in the parent class
        ortho_init, self.ortho_init = self.ortho_init, False
        super()._build(lr_schedule)
        self.ortho_init = ortho_init
        if ortho_init:
            gains = {
                self.pi_features_extractor: np.sqrt(2),
                self.vf_features_extractor: np.sqrt(2),
                self.action_net: 0.01,
                self.value_net: 1,
            }
            for module, gain in gains.items():
                module.apply(partial(self.init_weights, gain=gain))


class DeepActorCriticCnnPolicy(DeepActorCriticPolicy, ActorCriticCnnPolicy):
    """
    Deep residual policy for PPO, A2C, TRPO and images, see :class:`DeepPolicy`.
    """


class DeepMultiInputActorCriticPolicy(DeepActorCriticPolicy, MultiInputActorCriticPolicy):
    """
    Deep residual policy for PPO, A2C, TRPO and Dict observations, see :class:`DeepPolicy`.
    """


# --- Other algorithms -----------------------------------------------------------------------------------------------------


class DeepResidualExtractor(BaseFeaturesExtractor):
    """
    Residual tower as a features extractor, for algorithms and policies that have no deep policy of their own:
    ``policy_kwargs=dict(features_extractor_class=DeepResidualExtractor, features_extractor_kwargs=dict(depth=64))``.
    The features are the outputs of the last residual block. Images go through Stable-Baselines3's CNN first,
    Dict observations through its ``CombinedExtractor``.

    In off-policy actor-critic algorithms the actions come in behind it: there the deep policies are the better choice.
    With on-policy ones pass ``ortho_init=False`` too, or the towers lose their own initialization.

    :param observation_space: Observation space
    :param depth: Number of Dense layers inside the residual blocks, a positive multiple of 4
    :param width: Number of units of every layer, and number of features
    :param activation_fn: Activation function
    :param norm: Normalization after each Dense layer, ``"layer"`` or ``"none"``
    :param residual: Whether the blocks add the identity
    :param residual_scale: Factor of the residual branches,
        see :class:`~sb3_deepcrl.common.torch_layers.ResidualTower`
    :param normalized_image: Whether to assume that images are already normalized, see Stable-Baselines3's ``NatureCNN``
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        depth: int = 16,
        width: int = 256,
        activation_fn: type[nn.Module] = nn.SiLU,
        norm: Norm = "layer",
        residual: bool = True,
        residual_scale: float | str = "learnable",
        normalized_image: bool = False,
    ):
        super().__init__(observation_space, features_dim=check_positive_int(width, "width"))
        self.extractor: BaseFeaturesExtractor
        if isinstance(observation_space, spaces.Dict):
            self.extractor = CombinedExtractor(observation_space, normalized_image=normalized_image)
        elif is_image_space(observation_space, normalized_image=normalized_image):
            self.extractor = NatureCNN(observation_space, normalized_image=normalized_image)
        else:
            self.extractor = FlattenExtractor(observation_space)
        self.tower = ResidualTower(
            self.extractor.features_dim, None, depth, width, activation_fn, norm, residual, residual_scale
        )

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: Observations
        :return: Features of shape ``(batch_size, width)``
        """
        return self.tower(self.extractor(observations))


# --- Registry -------------------------------------------------------------------------------------------------------------


def policy_names(
    mlp: type[BasePolicy], cnn: type[BasePolicy] | None = None, multi_input: type[BasePolicy] | None = None
) -> dict[str, type[BasePolicy]]:
    """
    :param mlp: Policy for vectors
    :param cnn: Policy for images, None if the algorithm has none
    :param multi_input: Policy for Dict observations, None if the algorithm has none
    :return: The policies by the name that they are registered with
    """
    policies = {"DeepMlpPolicy": mlp, "DeepCnnPolicy": cnn, "DeepMultiInputPolicy": multi_input}
    return {name: policy for name, policy in policies.items() if policy is not None}


ACTOR_CRITIC_POLICIES = policy_names(DeepActorCriticPolicy, DeepActorCriticCnnPolicy, DeepMultiInputActorCriticPolicy)
TD3_POLICIES = policy_names(DeepTD3Policy, DeepTD3CnnPolicy, DeepTD3MultiInputPolicy)

#: Deep policies by algorithm and name. Those for sb3-contrib come in when it is imported.
POLICIES: dict[type[BaseAlgorithm], dict[str, type[BasePolicy]]] = {
    SAC: policy_names(DeepSACPolicy, DeepSACCnnPolicy, DeepSACMultiInputPolicy),
    TD3: TD3_POLICIES,
    DDPG: TD3_POLICIES,
    DQN: policy_names(DeepDQNPolicy, DeepDQNCnnPolicy, DeepDQNMultiInputPolicy),
    PPO: ACTOR_CRITIC_POLICIES,
    A2C: ACTOR_CRITIC_POLICIES,
}


def register_policies() -> None:
    """
    Add ``"DeepMlpPolicy"``, ``"DeepCnnPolicy"`` and ``"DeepMultiInputPolicy"`` to the policies that the algorithms of
    Stable-Baselines3 know by name, and to those of sb3-contrib as soon as it is imported. Importing ``sb3_deepcrl``
    does it. Names that somebody else has taken are left alone, with a warning.
    """
    _contrib_hook.install()
    add_policies(POLICIES)


def unregister_policies() -> None:
    """
    Undo :func:`register_policies`. Models that have these policies keep them, and can still be saved and loaded.
    """
    _contrib_hook.remove()
    for algorithm, policies in POLICIES.items():
        for name, policy in policies.items():
            if algorithm.policy_aliases.get(name) is policy:
                del algorithm.policy_aliases[name]


def import_contrib_policies() -> None:
    """
    Import the policies for sb3-contrib, which add themselves, with a warning if they do not fit to its release.
    """
    try:
        importlib.import_module("sb3_deepcrl.deep_policies.contrib_policies")
    except (ImportError, AttributeError, TypeError) as error:  # of another release: the user only wanted to import sb3-contrib
        warnings.warn(f"No deep policies for sb3-contrib ({error}): they need `pip install 'sb3-contrib>=2.9'`")


# That it is installed tells that the policies are registered
_contrib_hook = ImportHook("sb3_contrib", lambda module: import_contrib_policies())


def add_policies(policies: dict[type[BaseAlgorithm], dict[str, type[BasePolicy]]]) -> None:
    """
    Add policies to :data:`POLICIES` and, unless :func:`unregister_policies` was called, to the algorithms.

    :param policies: Policies by algorithm and name
    """
    POLICIES.update(policies)
    if not _contrib_hook.is_installed:
        return
    for algorithm, named_policies in policies.items():
        for name, policy in named_policies.items():
            taken = algorithm.policy_aliases.setdefault(name, policy)
            if taken is not policy:
                warnings.warn(
                    f"{algorithm.__name__} has another policy named {name} already, {taken.__module__}.{taken.__name__}: "
                    f"use the class {policy.__module__}.{policy.__name__} instead of the name"
                )
