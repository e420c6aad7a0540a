import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim, get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.nn import functional as F

from sb3_deepcrl.common.cuda_graphs import CudaGraphBackend, GraphedFunction
from sb3_deepcrl.common.distributions import squashed_gaussian
from sb3_deepcrl.common.losses import ENERGIES, rowwise_energy
from sb3_deepcrl.common.policies import CheckedPolicy
from sb3_deepcrl.common.running_norm import RunningNorm
from sb3_deepcrl.common.torch_layers import ResidualTower, lecun_uniform_, set_training_mode
from sb3_deepcrl.common.tower_kernel import apply_heads, has_kernel
from sb3_deepcrl.common.utils import check_choice, check_depth, check_positive_int

# Range of the log standard deviation before squashing
LOG_STD_MAX = 2
LOG_STD_MIN = -5

GOAL_KEY = "desired_goal"

# The actor looks at all discrete actions at once
MAX_ACTIONS = 1024
# Part of the largest entropy of discrete actions that is the target by default
TARGET_ENTROPY_FRACTION = 0.75

# What SAC's policies take and DeepCRL's have no use for
SAC_POLICY_KWARGS = {"net_arch", "n_critics", "share_features_extractor", "use_sde", "log_std_init", "use_expln", "clip_mean"}


def check_observation_space(observation_space: spaces.Space | None) -> None:
    """Check that an env has goals that can be relabeled: two of the same form, whatever their bounds and types."""
    found = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    missing = [f"`{key}`" for key in ("achieved_goal", "desired_goal") if key not in found]
    if missing:
        raise ValueError(
            "DeepCRL learns goal-conditioned envs: the observation space must be a `spaces.Dict` with the keys "
            f"`observation`, `achieved_goal` and `desired_goal`, but {', '.join(missing)} missing from {observation_space}. "
            "Wrap the env so that its observations tell which goal is reached and which one is wanted"
        )
    achieved, desired = found["achieved_goal"], found["desired_goal"]
    if achieved.shape != desired.shape or get_flattened_obs_dim(achieved) != get_flattened_obs_dim(desired):
        raise ValueError(
            "`achieved_goal` and `desired_goal` must be of the same space, because goals are relabeled with what was "
            f"achieved, got {achieved} and {desired}. Let the env give both in the same form"
        )


def check_action_space(action_space: spaces.Space) -> None:
    """Check that discrete actions are counted from 0 and few enough to be looked at one by one."""
    if isinstance(action_space, spaces.Box):
        return
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim > 1:
        raise ValueError(f"Actions must be vectors, but `action_space` is {action_space}: let the env take them flat")
    start = getattr(action_space, "start", 0)
    if np.any(start != 0):
        raise ValueError(f"Actions must be counted from 0, but `action_space` is {action_space}: shift them in the env")
    n_actions = math.prod(_n_choices(action_space))
    if n_actions > MAX_ACTIONS:
        raise ValueError(
            f"{action_space} has {n_actions} actions, but the actor looks at all of them in each update: use at most "
            f"{MAX_ACTIONS}, or let the env take continuous actions"
        )


def _n_choices(action_space: spaces.Space) -> list[int]:
    """Number of values of each component of a discrete action."""
    if isinstance(action_space, spaces.MultiDiscrete):
        return action_space.nvec.reshape(-1).tolist()
    return [int(action_space.n)] if isinstance(action_space, spaces.Discrete) else [2] * get_action_dim(action_space)


class _TowerModel(BaseModel):
    """What actor and critic share: arguments of residual towers, and observations that are normalized before anything else."""

    features_extractor: BaseFeaturesExtractor
    # What is saved besides the arguments of BaseModel
    _own_arguments: ClassVar[tuple[str, ...]] = ("features_extractor", "tower_kwargs", "normalizer")

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Space,
        features_extractor: BaseFeaturesExtractor,
        tower_kwargs: dict[str, Any],
        normalize_images: bool = True,
        normalizer: RunningNorm | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images, **kwargs
        )
        self.tower_kwargs = tower_kwargs
        self.normalizer = normalizer

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **{name: getattr(self, name) for name in self._own_arguments}}

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        normalized = obs if self.normalizer is None else self.normalizer(obs)
        return super().extract_features(normalized, features_extractor)


class Actor(_TowerModel, CheckedPolicy):
    """
    Actor network (policy) for DeepCRL: a residual tower from state and goal to the distribution of actions. What the
    distribution is, and the heads that give its parameters, the subclasses say.

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Network to extract features of state and goal
    :param tower_kwargs: Keyword arguments of :class:`~sb3_deepcrl.common.torch_layers.ResidualTower`
    :param normalize_images: Whether to divide images by 255
    :param normalizer: What normalizes the observations before anything else, if they are normalized
    """

    #: Entropy that ``target_entropy="auto"`` stands for
    target_entropy: float

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, squash_output=True, **kwargs)
        self.tower = ResidualTower(self.features_extractor.features_dim, None, **self.tower_kwargs)

    def _make_head(self, output_dim: int) -> nn.Linear:
        return lecun_uniform_(nn.Linear(self.tower.output_dim, output_dim))

    @property
    def heads(self) -> tuple[nn.Linear, ...]:
        """The last layers, after the tower."""
        raise NotImplementedError

    def _outputs(self, obs: PyTorchObs) -> tuple[th.Tensor, ...]:
        return apply_heads(self.tower, self.extract_features(obs, self.features_extractor), *self.heads)

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, ...]:
        """Parameters of the distribution of actions, tensors whose first dimension is ``batch_size``."""
        raise NotImplementedError

    def expected_value(
        self, params: tuple[th.Tensor, ...], value_of: Callable[[th.Tensor], th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Value and log-probability of actions, in the mean over their distribution or of one that is drawn from it.

        :param params: Parameters of the distribution
        :param value_of: Gives values of shape ``(n,)`` of actions of shape ``(n, action_dim)``, where ``n`` is a multiple of
            ``batch_size`` and the actions of an observation follow each other
        :return: Both of shape ``(batch_size,)``, to be differentiated
        """
        raise NotImplementedError

    def cloning_loss(self, params: tuple[th.Tensor, ...], actions: th.Tensor) -> th.Tensor:
        """Mean loss of behavior cloning of actions of shape ``(batch_size, action_dim)``, to be differentiated."""
        raise NotImplementedError

    @staticmethod
    def kl_divergence(target: tuple[th.Tensor, ...], params: tuple[th.Tensor, ...]) -> th.Tensor:
        """KL(target || own) of the distributions of actions with these parameters, shape ``(batch_size,)``."""
        raise NotImplementedError

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)


class GaussianActor(Actor):
    """
    Actor for continuous actions: a squashed diagonal Gaussian. The arguments are those of :class:`Actor`.
    """

    action_space: spaces.Box

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        action_dim = get_action_dim(self.action_space)
        self.mu = self._make_head(action_dim)
        self.log_std = self._make_head(action_dim)
        # SAC: minus the dimension
        self.target_entropy = -0.5 * action_dim

    @property
    def heads(self) -> tuple[nn.Linear, ...]:
        return self.mu, self.log_std

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """Mean and log standard deviation (from -5 to 2) before squashing, both of shape ``(batch_size, action_dim)``."""
        mean, log_std = self._outputs(obs)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (th.tanh(log_std) + 1.0)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        mean, log_std = self.get_action_dist_params(obs)
        if deterministic:
            return th.tanh(mean)
        return th.tanh(mean + log_std.exp() * th.randn_like(mean))

    def action_log_prob(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """Sample actions in [-1, 1], of shape ``(batch_size, action_dim)``, and their log-probability, ``(batch_size,)``."""
        return self.expected_value(self.get_action_dist_params(obs), lambda actions: actions)

    def expected_value(
        self, params: tuple[th.Tensor, ...], value_of: Callable[[th.Tensor], th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std = params
        actions, log_prob = squashed_gaussian(mean, log_std, th.randn_like(mean), fused=has_kernel(self.tower))
        return value_of(actions), log_prob

    def cloning_loss(self, params: tuple[th.Tensor, ...], actions: th.Tensor) -> th.Tensor:
        # Minus the log-probability of a Gaussian of variance 1 around the deterministic action, up to a constant
        return 0.5 * (th.tanh(params[0]) - actions).square().sum(dim=1).mean()

    @staticmethod
    def kl_divergence(target: tuple[th.Tensor, ...], params: tuple[th.Tensor, ...]) -> th.Tensor:
        # That of the Gaussians before squashing, which does not change it
        (target_mean, target_log_std), (mean, log_std) = target, params
        gap = ((target_mean - mean).square() + (2 * target_log_std).exp()) * (-2 * log_std).exp()
        return (log_std - target_log_std + 0.5 * gap - 0.5).sum(dim=1)


class CategoricalActor(Actor):
    """
    Actor for discrete actions: a probability for each of them, which are all combinations where an action has several
    components. The mean over all actions is exact, and needs no gradient of the critic: only its forward pass, with a row for
    each action (https://arxiv.org/abs/1910.07207, SAC for discrete actions). The arguments are those of :class:`Actor`.
    """

    actions: th.Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        n_choices = _n_choices(self.action_space)
        actions = np.stack(np.unravel_index(np.arange(math.prod(n_choices)), n_choices), axis=1)
        self.register_buffer("actions", th.as_tensor(actions), persistent=False)
        self.logits = self._make_head(len(actions))
        self.target_entropy = TARGET_ENTROPY_FRACTION * math.log(len(actions))

    @property
    def heads(self) -> tuple[nn.Linear, ...]:
        return (self.logits,)

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor]:
        """Log-probabilities of all actions, shape ``(batch_size, n_actions)``."""
        return (F.log_softmax(self._outputs(obs)[0], dim=1),)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        (log_probs,) = self.get_action_dist_params(obs)
        # The largest sum with Gumbel noise is a sample
        scores = log_probs if deterministic else log_probs - th.empty_like(log_probs).exponential_().log()
        actions = self.actions.index_select(0, scores.argmax(dim=1))
        # No action, which `predict` reports
        return th.where(log_probs[:, :1].isnan(), -1, actions)

    def expected_value(
        self, params: tuple[th.Tensor, ...], value_of: Callable[[th.Tensor], th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor]:
        (log_probs,) = params
        with th.no_grad():
            values = value_of(self.actions.repeat(len(log_probs), 1)).reshape(log_probs.shape)
        probs = log_probs.exp()
        return (probs * values).sum(dim=1), (probs * log_probs).sum(dim=1)

    def cloning_loss(self, params: tuple[th.Tensor, ...], actions: th.Tensor) -> th.Tensor:
        (log_probs,) = params
        # Which of them these are
        index = (self.actions == actions.unsqueeze(1)).all(dim=2).to(log_probs.dtype).argmax(dim=1, keepdim=True)
        return -log_probs.gather(1, index).mean()

    @staticmethod
    def kl_divergence(target: tuple[th.Tensor, ...], params: tuple[th.Tensor, ...]) -> th.Tensor:
        (target_log_probs,), (log_probs,) = target, params
        return (target_log_probs.exp() * (target_log_probs - log_probs)).sum(dim=1)


class ContrastiveCritic(_TowerModel):
    """
    Contrastive critic: an encoder of state and action and an encoder of the goal, whose energy tells how likely the goal
    is reached from there (section 2 of the paper).

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Network to extract features of the state (all but the desired goal)
    :param tower_kwargs: Keyword arguments of :class:`~sb3_deepcrl.common.torch_layers.ResidualTower`
    :param normalize_images: Whether to divide images by 255
    :param normalizer: What normalizes the observations before anything else, if they are normalized
    :param goal_features_extractor: Network to extract features of the desired goal
    :param repr_dim: Dimension of the representations
    :param energy: One of :data:`~sb3_deepcrl.common.losses.ENERGIES`
    """

    _own_arguments = (*_TowerModel._own_arguments, "goal_features_extractor", "repr_dim", "energy")

    def __init__(self, *args: Any, goal_features_extractor: BaseFeaturesExtractor, repr_dim: int, energy: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.goal_features_extractor = goal_features_extractor
        self.repr_dim = repr_dim
        self.energy = energy

        # Discrete actions are one-hot
        state_action_dim = self.features_extractor.features_dim + get_flattened_obs_dim(self.action_space)
        self.sa_encoder = ResidualTower(state_action_dim, repr_dim, **self.tower_kwargs)
        self.g_encoder = ResidualTower(goal_features_extractor.features_dim, repr_dim, **self.tower_kwargs)

    def extract_state_features(self, obs: dict[str, th.Tensor]) -> th.Tensor:
        """Features of the state, in which the desired goal has no part, shape ``(batch_size, features_dim)``."""
        return self.extract_features({key: obs[key] for key in obs if key != GOAL_KEY}, self.features_extractor)

    def encode_state_action(self, state_features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Encode state features and actions, as the replay buffer has them, with shape ``(n_actions, repr_dim)``.
        A state may have several actions, which follow each other.
        """
        if len(actions) > len(state_features):
            state_features = state_features.repeat_interleave(len(actions) // len(state_features), dim=0)
        if not isinstance(self.action_space, spaces.Box):
            actions = preprocess_obs(actions, self.action_space).flatten(1)  # type: ignore[union-attr]
        return self.sa_encoder(th.cat([state_features, actions], dim=1))

    def encode_goal(self, obs: dict[str, th.Tensor]) -> th.Tensor:
        """Encode the ``desired_goal`` of observations as representations of shape ``(batch_size, repr_dim)``."""
        return self.g_encoder(self.extract_features({GOAL_KEY: obs[GOAL_KEY]}, self.goal_features_extractor))

    def forward(self, obs: dict[str, th.Tensor], actions: th.Tensor) -> th.Tensor:
        """
        Value of actions, as in the replay buffer, shape ``(batch_size, 1)``: how likely they lead to the desired goal. With
        InfoNCE it is the log-ratio of the probability of reaching that goal from here and of reaching it at all, up to a
        constant that the penalty fixes.
        """
        state_action = self.encode_state_action(self.extract_state_features(obs), actions)
        return rowwise_energy(state_action, self.encode_goal(obs), self.energy).unsqueeze(1)


class DeepCRLPolicy(CheckedPolicy):
    """
    Policy class (with both actor and critic) for DeepCRL.

    :param observation_space: Observation space, with the keys ``achieved_goal`` and ``desired_goal``
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param depth: Number of Dense layers inside the residual blocks of the actor and of each encoder of the critic,
        a positive multiple of 4 (the first and the last layer are not counted)
    :param actor_depth: Depth of the actor, ``depth`` by default
    :param critic_depth: Depth of the encoders of the critic, ``depth`` by default
    :param width: Number of units of every hidden layer
    :param repr_dim: Dimension of the representations
    :param energy: Similarity of two representations: ``"norm"`` (negative Euclidean distance, the paper's), ``"squared"``,
        ``"dot"`` or ``"cosine"``
    :param activation_fn: Activation function
    :param norm: Normalization after each hidden Dense layer, ``"layer"`` or ``"none"``
    :param residual: Whether the blocks add the identity (False for the ablation)
    :param residual_scale: Factor of the residual branches: a number (1 in the paper), ``"1/N"`` for one over the number
        of blocks or ``"learnable"`` for one parameter a block that starts there,
        see :class:`~sb3_deepcrl.common.torch_layers.ResidualTower`
    :param features_extractor_class: Features extractor to use. The actor has one for the whole observation, the critic
        one for all but the desired goal and one for the desired goal.
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractors
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param normalize_observations: Whether actor and critic normalize their observations by running statistics, which they
        share, see :class:`~sb3_deepcrl.common.running_norm.RunningNorm`
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer
    :param sac_kwargs: What only SAC's policies use (``net_arch``, ``n_critics``, ...): accepted with a warning
    :raises ValueError: if an argument is out of its range
    :raises TypeError: if there is no such argument
    """

    observation_space: spaces.Dict
    actor: Actor
    critic: ContrastiveCritic

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        depth: int = 16,
        actor_depth: int | None = None,
        critic_depth: int | None = None,
        width: int = 256,
        repr_dim: int = 64,
        energy: str = "norm",
        activation_fn: type[nn.Module] = nn.SiLU,
        norm: str = "layer",
        residual: bool = True,
        residual_scale: float | str = "learnable",
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        normalize_observations: bool = False,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        **sac_kwargs: Any,
    ):
        if features_extractor_class in (FlattenExtractor, NatureCNN):
            raise ValueError(
                f"`features_extractor_class={features_extractor_class.__name__}` does not know Dict observations: "
                "use `CombinedExtractor` or a class of your own"
            )
        check_choice(normalize_images, (True, False), "normalize_images")
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        check_action_space(action_space)
        for name, value in dict(depth=depth, actor_depth=actor_depth, critic_depth=critic_depth).items():
            if value is not None:
                check_depth(value, name)
        check_positive_int(repr_dim, "repr_dim")
        check_choice(energy, ENERGIES, "energy")
        unknown = sac_kwargs.keys() - SAC_POLICY_KWARGS
        if unknown:
            raise TypeError(f"`policy_kwargs` has {sorted(unknown)}, which neither DeepCRL nor SAC knows: check the spelling")
        if sac_kwargs:
            warnings.warn(
                f"`policy_kwargs` has {', '.join(f'`{name}={value}`' for name, value in sac_kwargs.items())}, which DeepCRL "
                "does not use: its networks are residual towers, set by `depth` and `width`, with one critic and no gSDE"
            )

        self.normalize_observations = check_choice(normalize_observations, (True, False), "normalize_observations")
        self.depth = depth
        self.actor_depth = actor_depth
        self.critic_depth = critic_depth
        self.repr_dim = repr_dim
        self.energy = energy
        self.tower_kwargs = dict(
            width=width, activation_fn=activation_fn, norm=norm, residual=residual, residual_scale=residual_scale
        )
        self._graphed_actors: tuple[GraphedFunction, ...] | None = None
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        optimizer_kwargs = self.optimizer_kwargs
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and "foreach" not in optimizer_kwargs:
            # One kernel for all parameters
            optimizer_kwargs = {"fused": True, **optimizer_kwargs}
        self.actor = self.make_actor()
        self.critic = self.make_critic()
        for network in (self.actor, self.critic):
            network.optimizer = self.optimizer_class(network.parameters(), lr=lr_schedule(1), **optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = ["depth", "actor_depth", "critic_depth", "repr_dim", "energy", "optimizer_class", "optimizer_kwargs"]
        names += ["features_extractor_class", "features_extractor_kwargs", "normalize_observations"]
        data = {name: getattr(self, name) for name in names}
        # dummy lr schedule, not needed for loading policy alone
        data["lr_schedule"] = self._dummy_schedule
        return {**super()._get_constructor_parameters(), **data, **self.tower_kwargs}

    def make_actor(self) -> Actor:
        """Make an actor."""
        tower_kwargs = {"depth": self.actor_depth or self.depth, **self.tower_kwargs}
        actor_args = (self.observation_space, self.action_space, self.make_features_extractor(), tower_kwargs)
        normalizer = RunningNorm(self.observation_space) if self.normalize_observations else None
        actor_class = GaussianActor if isinstance(self.action_space, spaces.Box) else CategoricalActor
        return actor_class(*actor_args, self.normalize_images, normalizer).to(self.device)

    def make_critic(self) -> ContrastiveCritic:
        """Make a critic, with features extractors of its own for state and goal, and the normalization of the actor."""
        # The achieved goal belongs to the state: some envs give the position of the robot nowhere else (AntMaze)
        state_space = spaces.Dict({key: space for key, space in self.observation_space.spaces.items() if key != GOAL_KEY})
        goal_space = spaces.Dict({GOAL_KEY: self.observation_space.spaces[GOAL_KEY]})
        return ContrastiveCritic(
            self.observation_space,
            self.action_space,
            features_extractor=self._make_extractor_of(state_space),
            goal_features_extractor=self._make_extractor_of(goal_space),
            repr_dim=self.repr_dim,
            energy=self.energy,
            tower_kwargs={"depth": self.critic_depth or self.depth, **self.tower_kwargs},
            normalize_images=self.normalize_images,
            normalizer=self.actor.normalizer,
        ).to(self.device)

    def _make_extractor_of(self, space: spaces.Dict) -> BaseFeaturesExtractor:
        """Make a features extractor for some of the keys, for which a custom one may not be made."""
        extractor_class = self.features_extractor_class
        try:
            extractor = extractor_class(space, **self.features_extractor_kwargs)
            check_positive_int(extractor.features_dim, "features_dim")
        except (ArithmeticError, AssertionError, LookupError, ValueError) as error:
            raise ValueError(
                f"`features_extractor_class={getattr(extractor_class, '__name__', extractor_class)}` fails with the keys "
                f"{list(space)} ({type(error).__name__}: {error or 'no features'}): the critic has one for `{GOAL_KEY}` and "
                "one for all other keys, so that it must take any subset of the observation"
            ) from error
        return extractor

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self._graphed_actors is None or th.is_grad_enabled():
            return self.actor(observation, deterministic)
        # Moving or replacing parameters one by one is rare: these stand for all of them
        tower = self.actor.tower
        addresses = tuple(next(module.parameters()).data_ptr() for module in (tower, *self.actor.heads))
        key = (addresses, tower.autocast_dtype, self.actor.training)
        return self._graphed_actors[deterministic](observation, key)  # type: ignore[arg-type]

    def graph_actor(self, backend: CudaGraphBackend | None, required: bool = False) -> None:
        """
        Run the actor as a CUDA graph when it predicts, one for stochastic and one for deterministic actions; without a
        backend, as it is. Where it is required, an actor that cannot be captured is an error.
        """
        self._graphed_actors = None
        if backend is not None:
            actors = (self.actor, partial(self.actor, deterministic=True))
            self._graphed_actors = tuple(GraphedFunction(actor, backend, required=required) for actor in actors)

    def set_training_mode(self, mode: bool) -> None:
        """Put the policy in either training or evaluation mode, which affects batch normalization and dropout."""
        set_training_mode(self, mode)


MultiInputPolicy = DeepCRLPolicy
# Observations of a goal-conditioned env are always a Dict: these two names only exist
# so that Stable-Baselines3 tells the user to take the first one
MlpPolicy = DeepCRLPolicy
CnnPolicy = DeepCRLPolicy
