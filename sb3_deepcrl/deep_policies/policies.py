"""
Deep residual policies for the algorithms of Stable-Baselines3: its own policies, whose hidden layers are residual towers.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn import policies as dqn
from stable_baselines3.sac import policies as sac
from stable_baselines3.td3 import policies as td3
from torch import nn

from sb3_deepcrl.common.policies import CheckedPolicy
from sb3_deepcrl.common.torch_layers import Norm, ResidualTower, lecun_uniform_
from sb3_deepcrl.common.utils import check_depth, check_positive_int

CHECKS: dict[str, Callable[[int, str], int]] = {"depth": check_depth, "width": check_positive_int}


def greedy_actions(q_values: th.Tensor) -> th.Tensor:
    """Best actions by values of shape ``(batch_size, n_actions)``, -1 where they are no numbers."""
    return th.where(q_values.isnan().any(dim=1), -1, q_values.argmax(dim=1))


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
        # Needed by `_build()`, which the policies of Stable-Baselines3 call at the end of their constructors
        self.tower_settings = dict(
            depth=depth, width=width, activation_fn=activation_fn, norm=norm, residual=residual, residual_scale=residual_scale
        )
        self.tower_kwargs: dict[str, dict[str, Any]] = {name: {} for name in self.tower_names}
        for setting, value in self.tower_settings.items():
            self._divide(setting, value)
        # One hidden layer, which a tower replaces
        widths = {name: [tower["width"]] for name, tower in self.tower_kwargs.items()}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=widths if len(widths) > 1 else widths[self.tower_names[0]],
            **kwargs,
        )
        extractor = self.features_extractor_class
        is_flat = isinstance(extractor, type) and issubclass(extractor, FlattenExtractor)
        if isinstance(observation_space, spaces.Dict) and is_flat:
            raise ValueError("You must use `DeepMultiInputPolicy` when working with dict observation space, not DeepMlpPolicy")

    def _divide(self, setting: str, value: Any) -> None:
        """Give each tower its value of a setting, which is one for all or a dict."""
        separate = isinstance(value, Mapping)
        if separate and (len(self.tower_names) == 1 or set(value) != set(self.tower_names)):
            keys = " and ".join(map(repr, self.tower_names))
            fix = f"or a dict with the keys {keys}" if len(self.tower_names) > 1 else "as this policy has a single network"
            raise ValueError(f"`{setting}` must be one value {fix}, got {value!r}")
        for name, tower_kwargs in self.tower_kwargs.items():
            tower_kwargs[setting] = value[name] if separate else value
            if setting in CHECKS:
                CHECKS[setting](tower_kwargs[setting], f"{setting}[{name!r}]" if separate else setting)

    def _deepen(self, name: str, *networks: nn.Sequential) -> None:
        """
        Replace the hidden layer of networks, a Dense layer and an activation, by a residual tower. What is around it stays:
        the head, a squashing of its outputs, batch normalization.
        """
        for network in networks:
            index, hidden = next((index, layer) for index, layer in enumerate(network) if isinstance(layer, nn.Linear))
            network[index] = ResidualTower(hidden.in_features, None, **self.tower_kwargs[name]).to(self.device)
            del network[index + 1]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        del data["net_arch"]
        data.update(self.tower_settings)
        if hasattr(self, "share_features_extractor"):
            # Not all policies of Stable-Baselines3 save it
            data["share_features_extractor"] = self.share_features_extractor
        return data


class DeepContinuousPolicy(DeepPolicy):
    """What the deep policies of SAC, TD3, DDPG, TQC and CrossQ share: an actor and Q-networks of their own."""

    #: Attribute of the actor with its hidden layer
    actor_network: ClassVar[str] = "latent_pi"

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """Make an actor with a residual tower."""
        actor = super().make_actor(features_extractor)  # type: ignore[misc]
        self._deepen("pi", getattr(actor, self.actor_network))
        return actor

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """Make Q-networks, each with a residual tower."""
        critic = super().make_critic(features_extractor)  # type: ignore[misc]
        self._deepen("qf", *critic.q_networks)
        return critic


class DeepSACPolicy(DeepContinuousPolicy, sac.SACPolicy):
    """Deep residual policy for SAC, see :class:`DeepPolicy`."""


class DeepSACCnnPolicy(DeepSACPolicy, sac.CnnPolicy):
    """Deep residual policy for SAC and images, see :class:`DeepPolicy`."""


class DeepSACMultiInputPolicy(DeepSACPolicy, sac.MultiInputPolicy):
    """Deep residual policy for SAC and Dict observations, see :class:`DeepPolicy`."""


class DeepTD3Policy(DeepContinuousPolicy, td3.TD3Policy):
    """Deep residual policy for TD3 and DDPG, see :class:`DeepPolicy`."""

    actor_network = "mu"


class DeepTD3CnnPolicy(DeepTD3Policy, td3.CnnPolicy):
    """Deep residual policy for TD3, DDPG and images, see :class:`DeepPolicy`."""


class DeepTD3MultiInputPolicy(DeepTD3Policy, td3.MultiInputPolicy):
    """Deep residual policy for TD3, DDPG and Dict observations, see :class:`DeepPolicy`."""


class DeepDQNPolicy(DeepPolicy, dqn.DQNPolicy):
    """Deep residual policy for DQN, see :class:`DeepPolicy`."""

    tower_names = ("qf",)

    def _predict(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        return greedy_actions(self.q_net(obs))

    def make_q_net(self) -> dqn.QNetwork:
        """Make a Q-network with a residual tower."""
        network = super().make_q_net()
        self._deepen("qf", network.q_net)
        return network


class DeepDQNCnnPolicy(DeepDQNPolicy, dqn.CnnPolicy):
    """Deep residual policy for DQN and images, see :class:`DeepPolicy`."""


class DeepDQNMultiInputPolicy(DeepDQNPolicy, dqn.MultiInputPolicy):
    """Deep residual policy for DQN and Dict observations, see :class:`DeepPolicy`."""


class DeepActorCriticPolicy(DeepPolicy, ActorCriticPolicy):
    """
    Deep residual policy for PPO, A2C and TRPO, see :class:`DeepPolicy`.

    Orthogonal initialization (``ortho_init``) is that of features extractor and heads. The towers start as they do
    everywhere else: at outputs of the same size whatever the depth.
    """

    tower_names = ("pi", "vf")

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self._deepen("pi", self.mlp_extractor.policy_net)
        self._deepen("vf", self.mlp_extractor.value_net)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if self.ortho_init:
            # The towers too, by now
            for layer in self.mlp_extractor.modules():
                if isinstance(layer, nn.Linear):
                    lecun_uniform_(layer)


class DeepActorCriticCnnPolicy(DeepActorCriticPolicy, ActorCriticCnnPolicy):
    """Deep residual policy for PPO, A2C, TRPO and images, see :class:`DeepPolicy`."""


class DeepMultiInputActorCriticPolicy(DeepActorCriticPolicy, MultiInputActorCriticPolicy):
    """Deep residual policy for PPO, A2C, TRPO and Dict observations, see :class:`DeepPolicy`."""


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
    :param normalized_image: Whether to assume that images are already normalized, see Stable-Baselines3's ``NatureCNN``. With
        ``normalize_images=False`` it has to be given, or images of floats are flattened, with a warning
    :param tower_kwargs: Other arguments of :class:`~sb3_deepcrl.common.torch_layers.ResidualTower`, such as ``norm``
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        depth: int = 16,
        width: int = 256,
        normalized_image: bool = False,
        **tower_kwargs: Any,
    ):
        super().__init__(observation_space, features_dim=check_positive_int(width, "width"))
        self.extractor: BaseFeaturesExtractor
        if isinstance(observation_space, spaces.Dict):
            self.extractor = CombinedExtractor(observation_space, normalized_image=normalized_image)
        elif is_image_space(observation_space, normalized_image=normalized_image):
            self.extractor = NatureCNN(observation_space, normalized_image=normalized_image)
        else:
            self.extractor = FlattenExtractor(observation_space)
        for space in observation_space.values() if isinstance(observation_space, spaces.Dict) else [observation_space]:
            is_flattened = not is_image_space(space, normalized_image=normalized_image)
            # The range of normalized images, in the smallest size that the CNN takes
            is_like_image = is_image_space(space, normalized_image=True) and sorted(space.shape)[1] >= 36  # type: ignore[type-var, arg-type]
            if is_flattened and is_like_image and space.low.min() >= 0.0 and space.high.max() <= 1.0:  # type: ignore[attr-defined]
                warnings.warn(
                    f"{space} may be an image, but is flattened: for a CNN pass "
                    "`features_extractor_kwargs=dict(normalized_image=True)`"
                )
        self.tower = ResidualTower(self.extractor.features_dim, None, depth, width, **tower_kwargs)

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """Features of observations, shape ``(batch_size, width)``."""
        return self.tower(self.extractor(observations))
