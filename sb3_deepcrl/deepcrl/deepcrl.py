import contextlib
import inspect
import io
import json
import math
import os
import pathlib
import warnings
import zipfile
from collections.abc import Hashable, Iterable, Iterator
from copy import deepcopy
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import json_to_data, load_from_pkl, open_path
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    RolloutReturn,
    Schedule,
    TensorDict,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer, check_finite
from sb3_deepcrl.common.compilation import PRECISIONS, compile_blocks, compile_pays, set_precision, uncompile_blocks
from sb3_deepcrl.common.cuda_graphs import (
    CudaGraphBackend,
    GraphedFunction,
    can_capture,
    graph_key,
    prepare_optimizer,
    set_learning_rate,
)
from sb3_deepcrl.common.losses import CONTRASTIVE_LOSSES, ContrastiveMetrics, info_nce, rowwise_energy
from sb3_deepcrl.common.torch_layers import ResidualTower, frozen
from sb3_deepcrl.common.tower_kernel import FlatParameters, has_kernel, threads_of_kernel
from sb3_deepcrl.common.utils import (
    atomic_path,
    check_bool,
    check_choice,
    check_class,
    check_dict,
    check_number,
    check_positive_int,
    check_switch,
    is_integer,
)
from sb3_deepcrl.deepcrl.policies import (
    GOAL_KEY,
    Actor,
    CnnPolicy,
    ContrastiveCritic,
    DeepCRLPolicy,
    MlpPolicy,
    MultiInputPolicy,
)
from sb3_deepcrl.env_ids import find_spec

SelfDeepCRL = TypeVar("SelfDeepCRL", bound="DeepCRL")

# With "auto", one gradient step is done for so many transitions, whatever the number of envs
TRANSITIONS_PER_GRADIENT_STEP = 16

# Constructor arguments that are passed on to the policy, with their default
ARCHITECTURE = dict(depth=16, actor_depth=None, critic_depth=None, width=256, repr_dim=64, energy="norm")

# Keyword arguments that only HerReplayBuffer knows
HER_KWARGS = ("n_sampled_goal", "goal_selection_strategy", "copy_info_dict")

# Keyword arguments of the replay buffer that DeepCRL passes itself
REPLAY_BUFFER_ARGUMENTS = ("buffer_size", "device", "gamma", "optimize_memory_usage")

# Follow from the learning rates: not saved, and not read from older files, which hold them
SCHEDULES = ("lr_schedule", "critic_lr_schedule", "ent_coef_lr_schedule")

# A train() call holds no more sampled transitions than that at a time, in bytes
MAX_SAMPLE_BYTES = 2**28

# Name of the actions in a minibatch, next to those of the observations
ACTION_KEY = "__action__"

# What `_update` returns, in order, followed by "ent_coef_loss" where the coefficient is learned
UPDATE_METRICS = (
    "actor_loss",
    "critic_loss",
    "ent_coef",
    "entropy",
    "categorical_accuracy",
    "logits_pos",
    "logits_neg",
    "logsumexp",
)


def hold_the_same(achieved: spaces.Space, desired: spaces.Space) -> bool:
    """
    :param achieved: Space of the achieved goals
    :param desired: Space of the desired goals
    :return: Whether the networks can take the one for the other; bounds and type of the numbers do not matter
    """
    as_they_are = (spaces.Box, spaces.MultiBinary)
    if isinstance(achieved, as_they_are) and isinstance(desired, as_they_are):
        return achieved.shape == desired.shape
    if isinstance(achieved, spaces.MultiDiscrete) and isinstance(desired, spaces.MultiDiscrete):
        return np.array_equal(achieved.nvec, desired.nvec) and np.array_equal(achieved.start, desired.start)
    return achieved == desired


def as_float(value: Any) -> float:
    """
    :param value: A number, or a text that holds one
    :return: The number, NaN if it is none
    """
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def parse_ent_coef(ent_coef: str | float) -> tuple[float, bool]:
    """
    :param ent_coef: See :class:`DeepCRL`
    :return: The (initial) entropy coefficient and whether it is learned
    :raises ValueError: if it is neither a number nor "auto"
    """
    if ent_coef == "auto":
        return 1.0, True
    learned = isinstance(ent_coef, str) and ent_coef.startswith("auto_")
    value = as_float(str(ent_coef).removeprefix("auto_") if learned else ent_coef)
    if not 0.0 <= value < math.inf or (learned and value == 0.0):
        raise ValueError(
            '`ent_coef` must be a number that is not negative, "auto" to learn it, or "auto_0.1" to start with 0.1, '
            f"got {ent_coef!r}"
        )
    return value, learned


def check_learning_rate(learning_rate: float | Schedule, name: str) -> None:
    """
    :param learning_rate: What the user gave
    :param name: What it is called in the error message
    :raises ValueError: if it is neither a number that can be a learning rate nor a schedule that starts with one
    """
    rate = learning_rate(1.0) if callable(learning_rate) else learning_rate
    if isinstance(rate, str) or not 0.0 <= as_float(rate) < math.inf:
        returned = f", which returns {rate!r} at 1" if callable(learning_rate) else ""
        raise ValueError(
            f"`{name}` must be a number that is not negative, or a function of the remaining progress (from 1 to 0) that "
            f"returns one, got {learning_rate!r}{returned}"
        )


def make_schedule(learning_rate: float | Schedule) -> FloatSchedule:
    """
    :param learning_rate: A number, be it one of NumPy, or a schedule
    :return: The schedule
    """
    return FloatSchedule(learning_rate if callable(learning_rate) else float(learning_rate))


def own_schedule(name: str) -> property:
    """
    :param name: Attribute with the learning rate of one optimizer, None if it has none of its own
    :return: Property with its schedule. It follows from other attributes when it is read, as the user may replace them.
    """

    def get_schedule(model: "DeepCRL") -> Schedule:
        learning_rate = getattr(model, name)
        return model.lr_schedule if learning_rate is None else make_schedule(learning_rate)

    def set_schedule(model: "DeepCRL", schedule: Schedule) -> None:
        setattr(model, name, schedule)

    return property(get_schedule, set_schedule, doc=f"Schedule of ``{name}``, or ``lr_schedule`` where it is None.")


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    Check that an env is one that DeepCRL can learn.

    :param observation_space: Observation space of the env
    :param action_space: Action space of the env
    :raises ValueError: if it is not goal-conditioned, if the two goals are not of the same form, or if the actions are
        not continuous
    """
    found = list(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else []
    missing = [key for key in ("achieved_goal", "desired_goal") if key not in found]
    if missing:
        raise ValueError(
            "DeepCRL learns goal-conditioned envs: the observation space must be a `spaces.Dict` with the keys "
            f"`observation`, `achieved_goal` and `desired_goal`, but {', '.join(f'`{key}`' for key in missing)} missing from "
            f"{observation_space}. Wrap the env so that its observations tell which goal is reached and which one is wanted"
        )
    assert isinstance(observation_space, spaces.Dict)
    achieved, desired = observation_space["achieved_goal"], observation_space["desired_goal"]
    if not hold_the_same(achieved, desired):
        raise ValueError(
            "`achieved_goal` and `desired_goal` must be of the same space, because goals are relabelled with what was "
            f"achieved, got {achieved} and {desired}. Let the env give both in the same form"
        )
    if not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"DeepCRL only supports continuous actions (`spaces.Box`), but the action space is {action_space}. "
            "Use an env with continuous actions, or an algorithm for discrete ones, such as DQN with HerReplayBuffer"
        )


def longest_episode(env: VecEnv) -> int | None:
    """
    :param env: Any envs
    :return: Number of steps of their longest episode, None if they do not tell
    """
    # The attribute of the TimeLimit wrapper: unlike a spec, a number can always be sent from another process
    name = "_max_episode_steps"
    try:
        # The processes of SubprocVecEnv die of `get_attr` with a name that they do not know
        lengths = env.get_attr(name) if env.has_attr(name) else []
        return max((int(length) for length in lengths if length is not None), default=None)
    except Exception:
        # VecEnvs of simulators raise all kinds of errors and may return anything
        return None


class DeepCRL(OffPolicyAlgorithm):
    """
    Deep contrastive reinforcement learning: goal-conditioned, self-supervised (the reward is not used), with residual
    networks of any depth.

    Paper: https://arxiv.org/abs/2503.14858 (1000 Layer Networks for Self-Supervised RL).
    The critic learns by InfoNCE (equation 2) to tell the goals that a state and action lead to
    from those of other transitions; the actor is a maximum entropy policy that maximises the critic (equation 3).

    The env must be goal-conditioned: its observation is a Dict with the keys ``achieved_goal`` and ``desired_goal``,
    and usually ``observation``. ``compute_reward`` is not needed.

    :param policy: The policy model to use (``MultiInputPolicy``)
    :param env: The environment to learn from (can be the id of one, also of gymnasium-robotics, and of another package
        that it names: ``"panda_gym:PandaReach-v3"``)
    :param learning_rate: learning rate of the Adam optimizers, it can be a function of the current progress remaining
        (from 1 to 0)
    :param buffer_size: size of the replay buffer, over all envs
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update. The other rows of the minibatch are the negatives
        of the contrastive loss, so that it must be at least 2.
    :param tau: not used, accepted for compatibility with SAC (there is no target network)
    :param gamma: the discount factor: the goal of a transition is the state ``k`` steps later with probability
        proportional to ``gamma^k``
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``. By default such that one gradient step is done for 16 transitions,
        whatever the number of envs.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``).
        Set to ``-1`` means to do as many gradient steps as steps done in the environment during the rollout.
        By default one for 16 transitions (one, if ``train_freq`` is in episodes).
    :param action_noise: the action noise type (None by default), this can help for hard exploration problem.
        Cf common.noise for the different action noise type.
    :param replay_buffer_class: :class:`~sb3_deepcrl.common.buffers.ContrastiveReplayBuffer` or a subclass of it.
        ``HerReplayBuffer`` is accepted for compatibility and replaced by it with a warning.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: must be False, the replay buffer always stores observations once
    :param n_steps: must be 1, there are no n-step returns in contrastive RL
    :param ent_coef: Entropy regularization coefficient. Set it to 'auto' to learn it automatically
        (and 'auto_0.1' for using 0.1 as initial value)
    :param target_update_interval: not used, accepted for compatibility with SAC (there is no target network)
    :param target_entropy: target entropy when learning ``ent_coef``. ``"auto"`` is minus half the dimension of the
        actions, as in the paper's code (SAC: minus the dimension).
    :param depth: Number of Dense layers inside the residual blocks of the actor and of each encoder of the critic, a
        positive multiple of 4 (the first and the last layer are not counted)
    :param actor_depth: Depth of the actor, ``depth`` by default
    :param critic_depth: Depth of the encoders of the critic, ``depth`` by default
    :param width: Number of units of every hidden layer
    :param repr_dim: Dimension of the representations
    :param energy: Similarity of two representations: ``"norm"`` (negative Euclidean distance, the paper's),
        ``"squared"``, ``"dot"`` or ``"cosine"``
    :param contrastive_loss: Which way InfoNCE chooses: ``"forward"`` (a goal for each state and action, the paper's),
        ``"backward"`` or ``"symmetric"``
    :param logsumexp_coef: Coefficient of the log-sum-exp penalty
    :param random_goals: Fraction of the minibatch for which the actor is trained on the goal of another
        transition, instead of one that its own episode reached later (the paper's code: 0). The latter are mostly
        near ones: without others the actor never practises the far goals.
    :param critic_learning_rate: learning rate of the critic, ``learning_rate`` by default
    :param ent_coef_learning_rate: learning rate of the entropy coefficient, ``learning_rate`` by default
    :param compile: Whether to compile the networks, see :func:`~sb3_deepcrl.common.compilation.compile_blocks`: the start-up
        does not depend on the depth. ``"auto"`` does it on GPUs, and on CPUs with AVX2 or AVX-512 if ``learn()`` is long
        enough to earn it. Saved models do not depend on it.
    :param cuda_graph: Whether to run the updates, and the policy in ``predict``, as CUDA graphs. ``"auto"`` does it on GPUs.
    :param precision: ``"float32"`` or ``"bfloat16"`` for the matrix products of the networks; parameters, optimizers, residual
        sums and losses are float32 in any case. ``"auto"`` is bfloat16 where the hardware has it.
    :param checkpoint_activations: Whether to compute the inside of each residual block again in the backward pass, in place
        of keeping it: less memory, about one third more work
    :param contrastive_chunk_size: Compute the contrastive loss for so many rows of the minibatch at a time: less memory with
        very large ones. By default all at once.
    :param use_sde: must be False, generalized State Dependent Exploration (gSDE) is not supported
    :param sde_sample_freq: not used, accepted for compatibility with SAC
    :param use_sde_at_warmup: not used, accepted for compatibility with SAC
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation,
        see :class:`~sb3_deepcrl.deepcrl.policies.DeepCRLPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range or the env is not a goal-conditioned one with
        continuous actions
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DeepCRLPolicy
    actor: Actor
    critic: ContrastiveCritic
    replay_buffer: ContrastiveReplayBuffer | None
    critic_lr_schedule = own_schedule("critic_learning_rate")
    ent_coef_lr_schedule = own_schedule("ent_coef_learning_rate")

    def __init__(
        self,
        policy: str | type[DeepCRLPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 1000,
        batch_size: int = 512,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | str | tuple[int, str] = "auto",
        gradient_steps: int | str = "auto",
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto_0.1",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        depth: int = 16,
        actor_depth: int | None = None,
        critic_depth: int | None = None,
        width: int = 256,
        repr_dim: int = 64,
        energy: str = "norm",
        contrastive_loss: str = "forward",
        logsumexp_coef: float = 0.1,
        random_goals: float = 0.5,
        critic_learning_rate: float | Schedule | None = None,
        ent_coef_learning_rate: float | Schedule | None = None,
        compile: bool | str = "auto",
        cuda_graph: bool | str = "auto",
        precision: str = "float32",
        checkpoint_activations: bool = False,
        contrastive_chunk_size: int | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        check_dict(policy_kwargs, "policy_kwargs")
        architecture: dict[str, Any] = dict(
            depth=depth,
            actor_depth=actor_depth,
            critic_depth=critic_depth,
            width=width,
            repr_dim=repr_dim,
            energy=energy,
        )
        if isinstance(env, str):
            env = find_spec(env).id
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,  # type: ignore[arg-type]
            gradient_steps,  # type: ignore[arg-type]
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=dict(policy_kwargs or {}),
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            sde_support=False,
            support_multi_env=True,
        )

        self.target_entropy = target_entropy
        self.log_ent_coef = None  # type: th.Tensor | None
        # Entropy coefficient / Entropy temperature
        # Inverse of the reward scale
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.ent_coef_optimizer: th.optim.Adam | None = None
        merged = self._merge_policy_kwargs(architecture, self.policy_kwargs)
        self.depth = merged["depth"]
        self.actor_depth = merged["actor_depth"]
        self.critic_depth = merged["critic_depth"]
        self.width = merged["width"]
        self.repr_dim = merged["repr_dim"]
        self.energy = merged["energy"]
        self.contrastive_loss = contrastive_loss
        self.logsumexp_coef = logsumexp_coef
        self.random_goals = random_goals
        self.critic_learning_rate = critic_learning_rate
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.compile = compile
        self.cuda_graph = cuda_graph
        self.precision = precision
        self.checkpoint_activations = checkpoint_activations
        self.contrastive_chunk_size = contrastive_chunk_size
        # What to choose anew when the model is loaded with another number of envs
        self._auto_settings = [
            name for name, value in (("train_freq", train_freq), ("gradient_steps", gradient_steps)) if value == "auto"
        ]
        # Whether the last rollout stopped before its transition was stored
        self._rollout_interrupted = False
        # Number of steps by which the next rollout is longer, as the last one ended with learn() but had all its updates
        self._missing_steps = 0
        self._warned_of_clipped_goals = False
        self._warned_of_few_transitions = False
        # Number of timesteps at the last dump of the logger
        self._logged_timesteps: int | None = None

        # Whether the residual blocks are compiled, None if nobody has tried
        self._compiled: bool | None = None
        # Networks that the kernel for CPUs updates, by their optimizer
        self._flat: dict[th.optim.Optimizer, FlatParameters | None] = {}
        self._graphed_update: GraphedFunction | None = None

        check_class(self.policy_class, DeepCRLPolicy, "policy", 'leave it at "MultiInputPolicy"')
        if self.env is not None:
            check_spaces(self.observation_space, self.action_space)
        elif _init_setup_model:
            raise ValueError(
                f"`env={env}`, but the networks are made for the spaces of an env: give one. To predict with a model that was "
                "saved, `DeepCRL.load(path)` needs none"
            )

        if _init_setup_model:
            self._check_settings()
            if self.n_envs > 1 and getattr(self.train_freq, "unit", None) == TrainFrequencyUnit.EPISODE:
                raise ValueError(
                    f"`train_freq={train_freq}` counts episodes, which needs a single env, got {self.n_envs}: count steps"
                )
            self._check_buffer_size()
            self._setup_model()

    @staticmethod
    def _merge_policy_kwargs(architecture: dict[str, Any], policy_kwargs: dict[str, Any]) -> dict[str, Any]:
        """
        :param architecture: Arguments of the constructor that belong to the policy
        :param policy_kwargs: What the user gave as ``policy_kwargs``
        :return: Both together, in a new dict
        :raises ValueError: if they contradict each other
        """
        for name in architecture.keys() & policy_kwargs.keys():
            if architecture[name] not in (ARCHITECTURE[name], policy_kwargs[name]):
                raise ValueError(
                    f"`{name}={architecture[name]!r}` contradicts `policy_kwargs`, where it is {policy_kwargs[name]!r}: "
                    "give it once"
                )
        return {**architecture, **policy_kwargs}

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise ValueError(f'Policy {policy_name} unknown: use "MultiInputPolicy"')
        return super()._get_policy_from_name(policy_name)

    def _check_settings(self) -> None:
        """
        Check what the user can set in the constructor, in ``load()`` or as an attribute.

        :raises ValueError: if a value is out of its range
        """
        check_choice(self.contrastive_loss, CONTRASTIVE_LOSSES, "contrastive_loss")
        for name in ("gamma", "random_goals"):
            check_number(getattr(self, name), name, maximum=1.0)
        check_number(self.logsumexp_coef, "logsumexp_coef")
        parse_ent_coef(self.ent_coef)
        if self.target_entropy != "auto" and not math.isfinite(as_float(self.target_entropy)):
            raise ValueError(
                '`target_entropy` must be a finite number, or "auto" for minus half the dimension of the actions, '
                f"got {self.target_entropy!r}"
            )
        for name in ("learning_rate", "critic_learning_rate", "ent_coef_learning_rate"):
            if name == "learning_rate" or getattr(self, name) is not None:
                check_learning_rate(getattr(self, name), name)
        self._check_rollout_settings()
        self._check_acceleration_settings()
        self._check_unsupported_settings()

    def _check_rollout_settings(self) -> None:
        """
        Check what says how transitions are collected, stored, sampled and logged.

        :raises ValueError: if a value is out of its range
        """
        for name, value in (
            ("buffer_size", self.buffer_size),
            ("batch_size", self.batch_size),
            ("stats_window_size", self._stats_window_size),
        ):
            check_positive_int(value, name)
        if self.batch_size < 2:
            raise ValueError(
                f"`batch_size` must be at least 2, got {self.batch_size}: the negatives of the contrastive loss are the "
                "other rows of the minibatch"
            )
        check_number(self.learning_starts, "learning_starts")
        if self.gradient_steps != "auto" and (not is_integer(self.gradient_steps) or self.gradient_steps < -1):
            raise ValueError(
                f'`gradient_steps` must be an integer or "auto", got {self.gradient_steps!r}: -1 means as many as there were '
                "steps, 0 none"
            )
        if self.train_freq != "auto":
            self._convert_train_freq()
        if self.action_noise is not None and not isinstance(self.action_noise, ActionNoise):
            raise ValueError(
                f"`action_noise` must be an ActionNoise, such as `NormalActionNoise(mean, sigma)`, got {self.action_noise!r}"
            )
        check_dict(self.replay_buffer_kwargs, "replay_buffer_kwargs")
        # Python's random generator takes none of NumPy's integers
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed < 2**32):
            raise ValueError(f"`seed` must be None or a Python integer from 0 to 2**32 - 1, got {self.seed!r}")
        if self.tensorboard_log is not None and not isinstance(self.tensorboard_log, (str, os.PathLike)):
            raise ValueError(f"`tensorboard_log` must be the path of a folder or None, got {self.tensorboard_log!r}")

    def _check_acceleration_settings(self) -> None:
        """
        Check what says how the networks run.

        :raises ValueError: if a value is out of its range
        """
        check_switch(self.compile, "compile")
        check_switch(self.cuda_graph, "cuda_graph")
        check_choice(self.precision, PRECISIONS, "precision")
        check_bool(self.checkpoint_activations, "checkpoint_activations")
        if self.contrastive_chunk_size is not None:
            check_positive_int(self.contrastive_chunk_size, "contrastive_chunk_size")
        if self.cuda_graph is True and self.device.type != "cuda":
            raise ValueError(
                f'`cuda_graph=True` needs a GPU, but the device is {self.device}: leave it at "auto", which is off there'
            )

    def _check_unsupported_settings(self) -> None:
        """
        Check what SAC knows and DeepCRL does not.

        :raises ValueError: if it is asked for
        """
        if self.n_steps != 1:
            raise ValueError(
                f"`n_steps` must be 1, got {self.n_steps}: contrastive RL bootstraps from no return, so that there are no "
                "n-step returns. `gamma` sets how far ahead goals are"
            )
        if self.optimize_memory_usage:
            raise ValueError(
                "`optimize_memory_usage=True` is not supported: leave it at False, "
                "the replay buffer already stores every observation once"
            )
        if self.use_sde:
            raise ValueError(
                "`use_sde=True`: generalized State Dependent Exploration is not supported, use `ent_coef` or `action_noise` "
                "for more exploration"
            )

    def _check_buffer_size(self) -> None:
        """
        Check that the longest episode fits into the replay buffer, if the env tells how long it is.

        :raises ValueError: if it does not
        """
        assert self.env is not None
        longest = longest_episode(self.env)
        if longest is not None and self.buffer_size // self.n_envs < longest:
            raise ValueError(
                f"`buffer_size={self.buffer_size}` leaves {self.buffer_size // self.n_envs} transitions for each of the "
                f"{self.n_envs} envs, less than one episode of {longest} steps, within which goals are drawn: "
                f"use at least {self.n_envs * longest}"
            )

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = make_schedule(self.learning_rate)

    def _setup_replay_buffer_class(self) -> None:
        """
        Put the contrastive replay buffer in the place of HerReplayBuffer, which existing code may ask for.

        :raises ValueError: if the user asks for a class whose samples hold no future goals
        """
        if self.replay_buffer_class is not None and not isinstance(self.replay_buffer_class, type):
            raise ValueError(
                "`replay_buffer_class` must be ContrastiveReplayBuffer or a subclass of it, got "
                f"{self.replay_buffer_class!r}, which is no class: leave it out"
            )
        is_her = self.replay_buffer_class is not None and issubclass(self.replay_buffer_class, HerReplayBuffer)
        ignored = [name for name in HER_KWARGS if name in self.replay_buffer_kwargs]
        if is_her or ignored:
            warnings.warn(
                "DeepCRL uses its ContrastiveReplayBuffer in place of HerReplayBuffer, whose batches hold real goals, which "
                "are no positives for the contrastive loss"
                + (f"; {', '.join(f'`{name}`' for name in ignored)} not used" if ignored else "")
                + ". Leave `replay_buffer_class` and its arguments out to get rid of this warning"
            )
            self.replay_buffer_kwargs = {
                name: value for name, value in self.replay_buffer_kwargs.items() if name not in HER_KWARGS
            }
        for name in REPLAY_BUFFER_ARGUMENTS:
            if name in self.replay_buffer_kwargs:
                raise ValueError(
                    f"`replay_buffer_kwargs` has `{name}={self.replay_buffer_kwargs[name]}`, but the replay buffer takes the "
                    f"`{name}` of DeepCRL: set that one"
                )
        if self.replay_buffer_class is None or is_her:
            self.replay_buffer_class = ContrastiveReplayBuffer
        elif not issubclass(self.replay_buffer_class, ContrastiveReplayBuffer):
            raise ValueError(
                f"`replay_buffer_class` must be ContrastiveReplayBuffer or a subclass of it, got "
                f"{self.replay_buffer_class.__name__}, whose samples hold no goals that were reached later: leave it out"
            )

    def _convert_train_freq(self) -> None:
        train_freq = self.train_freq if isinstance(self.train_freq, (tuple, list)) else (self.train_freq, "step")
        frequency = train_freq[0] if len(train_freq) == 2 else None
        if not is_integer(frequency) or frequency < 1:
            raise ValueError(
                '`train_freq` must be a positive integer, one with a unit, like (5, "step") or (2, "episode"), or "auto", '
                f"got {self.train_freq!r}"
            )
        if not isinstance(self.train_freq, TrainFreq):
            self.train_freq = (int(frequency), train_freq[1])  # type: ignore[assignment]
        super()._convert_train_freq()

    def _setup_train_freq(self) -> None:
        """
        Replace "auto" by numbers.
        """
        if self.train_freq == "auto" and self.gradient_steps == "auto":
            divisor = math.gcd(TRANSITIONS_PER_GRADIENT_STEP, self.n_envs)
            self.train_freq, self.gradient_steps = TRANSITIONS_PER_GRADIENT_STEP // divisor, self.n_envs // divisor
        elif self.train_freq == "auto":
            transitions = TRANSITIONS_PER_GRADIENT_STEP * max(self.gradient_steps, 1)
            self.train_freq = max(1, round(transitions / self.n_envs))
        elif self.gradient_steps == "auto":
            self._convert_train_freq()
            assert isinstance(self.train_freq, TrainFreq)
            # The length of an episode is not known here
            n_steps = self.train_freq.frequency if self.train_freq.unit == TrainFrequencyUnit.STEP else 1
            self.gradient_steps = max(1, round(n_steps * self.n_envs / TRANSITIONS_PER_GRADIENT_STEP))
        self._convert_train_freq()

    def _setup_model(self) -> None:
        self._check_settings()
        self._setup_replay_buffer_class()
        self._setup_train_freq()
        # In a loaded model the one or the other may have been replaced or left out
        self.policy_kwargs = {**{name: getattr(self, name) for name in ARCHITECTURE}, **self.policy_kwargs}
        for name in ARCHITECTURE:
            setattr(self, name, self.policy_kwargs[name])
        super()._setup_model()
        assert self.replay_buffer is not None
        self.replay_buffer.gamma = self.gamma
        self._create_aliases()
        # Target entropy is used when learning the entropy coefficient
        if self.target_entropy == "auto":
            self.target_entropy = -0.5 * float(np.prod(self.action_space.shape))  # type: ignore[arg-type]
        else:
            self.target_entropy = float(self.target_entropy)

        ent_coef, learned = parse_ent_coef(self.ent_coef)
        if learned:
            self.log_ent_coef = th.log(th.ones(1, device=self.device) * ent_coef).requires_grad_(True)
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.ent_coef_lr_schedule(1))
        else:
            self.ent_coef_tensor = th.tensor(ent_coef, device=self.device)
        self._setup_acceleration()

    def _setup_acceleration(self, n_updates: int = 0) -> None:
        """
        Let the networks run as ``compile``, ``cuda_graph``, ``precision`` and ``checkpoint_activations`` say, which the user
        may have changed since the last time.

        :param n_updates: Number of updates ahead
        """
        set_precision(self.policy, self.precision, self.device)
        for module in self.policy.modules():
            if isinstance(module, ResidualTower):
                module.checkpoint_activations = self.checkpoint_activations
        depth = max(self.policy.actor_depth or self.policy.depth, self.policy.critic_depth or self.policy.depth)
        if self.compile is True or (self.compile == "auto" and compile_pays(self.device, n_updates * depth)):
            # Tried once, so that there is one warning where it fails
            if self._compiled is None:
                if self.verbose >= 1:
                    print("Compiling the networks: the first time takes a while")
                self._compiled = compile_blocks(self.policy)
        elif self.compile is False:
            uncompile_blocks(self.policy)
            self._compiled = None
        backend = CudaGraphBackend(self.device) if self.device.type == "cuda" and self.cuda_graph is not False else None
        required = self.cuda_graph is True
        self._graphed_update = None
        if backend is not None and can_capture(self._optimizers(), required):
            self._graphed_update = GraphedFunction(self._update_minibatch, backend, required=required)
        self.policy.graph_actor(backend, required)
        self._prepare_optimizers()

    def _prepare_optimizers(self) -> None:
        for optimizer in self._optimizers():
            prepare_optimizer(optimizer, capturable=self._graphed_update is not None)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        return optimizers if self.ent_coef_optimizer is None else [*optimizers, self.ent_coef_optimizer]

    def _graph_key(self) -> tuple[Hashable, ...]:
        """
        :return: All that a graph of ``_update`` keeps besides the minibatch: numbers that are read on the host, and where
            parameters and the state of the optimizers are
        """
        settings = (
            self.logsumexp_coef,
            self.random_goals,
            self.contrastive_loss,
            self.target_entropy,
            self.contrastive_chunk_size,
            self.critic.energy,
            self.precision,
            self.checkpoint_activations,
            self._compiled,
        )
        ent_coef = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef
        return graph_key(settings, self.policy, self._optimizers(), [ent_coef])

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._check_settings()
        self._setup_train_freq()
        assert self.env is not None, "You must set the environment before calling learn()"
        self._check_buffer_size()
        assert self.replay_buffer is not None
        if isinstance(self.train_freq, TrainFreq) and self.train_freq.unit == TrainFrequencyUnit.STEP:
            per_step = self.gradient_steps / (self.train_freq.frequency * self.n_envs) if self.gradient_steps > 0 else 1.0
        else:
            per_step = 1 / TRANSITIONS_PER_GRADIENT_STEP
        self._setup_acceleration(round(total_timesteps * per_step))
        if self._rollout_interrupted:
            # The envs went on without us, the last observation is no longer theirs
            self._last_obs = None
            self._rollout_interrupted = False
        if reset_num_timesteps or self._last_obs is None:
            # The envs are about to be reset
            self.replay_buffer.truncate_last_trajectory()
        self._logged_timesteps = None
        with self._normalization_kept_on_error():
            result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
            last_obs, self._last_obs = self._last_obs, None
            # Raises with no observation left behind, so that the next call resets the envs again
            check_finite(self._original_obs(last_obs))
            self._last_obs = last_obs
        return result

    def _original_obs(self, obs: Any) -> dict[str, np.ndarray]:
        """
        :param obs: The last observation of the env
        :return: The same without normalisation
        """
        return obs if self._vec_normalize_env is None else self._vec_normalize_env.get_original_obs()  # type: ignore[return-value]

    @contextlib.contextmanager
    def _normalization_kept_on_error(self) -> Iterator[None]:
        """
        Put the running statistics of VecNormalize back if a value from the env is not a number: it is in them already.
        """
        vec_normalize = self._vec_normalize_env
        # There is no `obs_rms` where observations are not normalised
        attributes = {} if vec_normalize is None else vars(vec_normalize)
        names = attributes.keys() & {"obs_rms", "ret_rms"}
        statistics = deepcopy({name: attributes[name] for name in names})
        try:
            yield
        except ValueError:
            attributes.update(statistics)
            raise

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # Some envs, or an episode, may go beyond the end
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, train_freq: TrainFreq, *args: Any, **kwargs: Any
    ) -> RolloutReturn:
        """
        Collect experiences and store them into the replay buffer,
        see :meth:`~stable_baselines3.common.off_policy_algorithm.OffPolicyAlgorithm.collect_rollouts`.

        The last rollout of ``learn()`` ends with it. What it is shorter than ``train_freq``, the first one of the next
        ``learn()`` is longer, so that the ratio of updates to steps does not depend on how a training is divided.

        :param env: The training environment
        :param callback: Callback that will be called at each step
        :param train_freq: How much experience to collect
        :param args: Other positional arguments of that method
        :param kwargs: Other keyword arguments of that method
        :return: How much was collected and whether to go on
        :raises ValueError: if a value from the env, or an action, is NaN or infinite
        """
        # Another number of envs, or the user, may have made rollouts shorter since
        missing_steps, self._missing_steps = min(self._missing_steps, train_freq.frequency - 1), 0
        n_short = 0
        n_left = (self._total_timesteps - self.num_timesteps) / env.num_envs
        if train_freq.unit == TrainFrequencyUnit.STEP and n_left > 0:
            n_wanted = train_freq.frequency + missing_steps
            n_steps = n_wanted if n_left >= n_wanted else math.ceil(n_left)
            n_short = n_wanted - n_steps
            train_freq = TrainFreq(n_steps, train_freq.unit)
        # Stays true when a callback, an exception or Ctrl-C stops the rollout
        self._rollout_interrupted = True
        with self._normalization_kept_on_error():
            rollout = super().collect_rollouts(env, callback, train_freq, *args, **kwargs)
        self._rollout_interrupted = not rollout.continue_training
        has_updates = self.gradient_steps >= 0 and self.num_timesteps > self.learning_starts
        if n_short > 0 and rollout.continue_training and has_updates:
            self._missing_steps = n_short
            if train_freq.frequency <= missing_steps:
                # Their updates were done at the end of the last learn()
                self._missing_steps = missing_steps - train_freq.frequency
                return rollout._replace(continue_training=False)
        return rollout

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        # VecEnvs of simulators return them as numbers, lists or tensors
        dones = np.asarray(dones, dtype=bool).reshape(-1)
        # The replay buffer checks the last observation of an episode, but does not see the first one of the next
        if dones.any():
            first_obs = self._original_obs(new_obs)
            check_finite({key: np.asarray(value)[dones] for key, value in first_obs.items()}, np.flatnonzero(dones))
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def dump_logs(self) -> None:
        """
        Write log data, unless there is nothing new: where episodes of several envs end at the same step, once for all.
        """
        if self._logged_timesteps == self.num_timesteps and not self.logger.name_to_value:
            return
        self._logged_timesteps = self.num_timesteps
        super().dump_logs()

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer once and do the updates, each on a minibatch of its own.

        :param gradient_steps: Number of updates
        :param batch_size: Number of transitions in a minibatch
        :raises ValueError: if the batch is too small for the contrastive loss
        """
        if batch_size < 2:
            raise ValueError(f"`batch_size` must be at least 2, got {batch_size}: there would be no negatives")
        if gradient_steps < 1:
            return
        assert self.replay_buffer is not None
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        # Update learning rates according to their schedule
        self._update_learning_rate([])
        set_learning_rate(self.actor.optimizer, self.lr_schedule(self._current_progress_remaining))
        set_learning_rate(self.critic.optimizer, self.critic_lr_schedule(self._current_progress_remaining))
        if self.ent_coef_optimizer is not None:
            set_learning_rate(self.ent_coef_optimizer, self.ent_coef_lr_schedule(self._current_progress_remaining))

        self._warn_of_few_transitions(batch_size)
        self.replay_buffer.gamma = self.gamma
        steps_at_once = max(1, MAX_SAMPLE_BYTES // (self.replay_buffer.transition_bytes * batch_size))
        metrics: list[th.Tensor] = []
        clipped: list[th.Tensor] = []
        watched = self._vec_normalize_env if self._may_clip_goals() else None
        graph_key = None if self._graphed_update is None else self._graph_key()
        while len(metrics) < gradient_steps:
            n_steps = min(steps_at_once, gradient_steps - len(metrics))
            observations, actions = self.replay_buffer.sample_contrastive(n_steps * batch_size, env=self._vec_normalize_env)
            if watched is not None:
                clipped.append((observations[GOAL_KEY].abs() >= watched.clip_obs).float().mean())
            for start in range(0, n_steps * batch_size, batch_size):
                rows = slice(start, start + batch_size)
                minibatch = {key: values[rows] for key, values in observations.items()}
                metrics.append(self._run_update(minibatch, actions[rows], graph_key))
        self._n_updates += gradient_steps

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        names = UPDATE_METRICS if self.ent_coef_optimizer is None else (*UPDATE_METRICS, "ent_coef_loss")
        means = th.stack(metrics).mean(dim=0)
        if clipped:
            means = th.cat((means, th.stack(clipped).mean(dim=0, keepdim=True)))
        # The only time that the host waits for the device
        values = means.tolist()
        if clipped:
            self._warn_of_clipped_goals(values.pop())
        for name, value in zip(names, values, strict=True):
            self.logger.record(f"train/{name}", value)

    def _warn_of_few_transitions(self, batch_size: int) -> None:
        """
        Warn once if rows of a minibatch must be the same transition: the negatives of a row are then its positive.

        :param batch_size: Number of transitions in a minibatch
        """
        assert self.replay_buffer is not None
        rows = self.replay_buffer.buffer_size if self.replay_buffer.full else self.replay_buffer.pos
        n_transitions = rows * self.replay_buffer.n_envs
        if n_transitions >= batch_size or self._warned_of_few_transitions:
            return
        self._warned_of_few_transitions = True
        if self.replay_buffer.full:
            remedy = f"`buffer_size` of at least {batch_size}"
        else:
            remedy = f"`learning_starts` of at least {self.num_timesteps + batch_size - n_transitions}"
        warnings.warn(
            f"`batch_size={batch_size}` is more than the {n_transitions} transitions in the replay buffer, so that negatives "
            f"of the contrastive loss are copies of its positives: use {remedy}, or a smaller `batch_size`"
        )

    def _may_clip_goals(self) -> bool:
        """
        :return: Whether to find out if VecNormalize clips the goals: only what it normalises is clipped, and its statistics
            need the goals of a few episodes
        """
        vec_normalize = self._vec_normalize_env
        return (
            not self._warned_of_clipped_goals
            and vec_normalize is not None
            and vec_normalize.norm_obs
            and GOAL_KEY in (vec_normalize.norm_obs_keys or ())
            and self.n_envs + self._episode_num > 2
        )

    def _warn_of_clipped_goals(self, fraction: float) -> None:
        """
        Warn once if VecNormalize makes the goals useless, as it does when the desired goal never changes: its variance
        is zero then, and all other goals end at the limits.

        :param fraction: Fraction of the coordinates of the normalised goals that are at the limits
        """
        if fraction > 0.5:
            self._warned_of_clipped_goals = True
            warnings.warn(
                "VecNormalize clips most of the relabelled goals, because the env's own `desired_goal` varies too little: "
                "exclude it, for instance with `VecNormalize(env, norm_obs_keys=['observation'])`"
            )

    def _update_minibatch(self, minibatch: dict[str, th.Tensor]) -> th.Tensor:
        """The same as ``_update``, with the actions among the observations."""
        observations = dict(minibatch)
        return self._update(observations, observations.pop(ACTION_KEY))

    def _run_update(
        self, observations: dict[str, th.Tensor], actions: th.Tensor, graph_key: tuple[Hashable, ...] | None = None
    ) -> th.Tensor:
        """
        Do what ``_update`` does, in the fastest way that there is: as a CUDA graph, or with the kernel for CPUs.

        :param observations: Observations, with the goals that were reached later in place of the desired ones
        :param actions: Actions in [-1, 1], shape ``(batch_size, action_dim)``
        :param graph_key: Outcome of :meth:`_graph_key`
        :return: What ``UPDATE_METRICS`` names
        """
        if self._graphed_update is not None:
            return self._graphed_update({**observations, ACTION_KEY: actions}, graph_key or self._graph_key())
        if not has_kernel(self.actor.tower, self.critic.sa_encoder):
            return self._update(observations, actions)
        with contextlib.ExitStack() as stack:
            stack.enter_context(threads_of_kernel())
            for network in (self.actor, self.critic):
                flat = self._flat.pop(network.optimizer, None)
                if flat is None or not flat.holds():
                    flat = FlatParameters.make(network, network.optimizer)
                if flat is not None:
                    self._flat[network.optimizer] = flat
                    stack.enter_context(flat.in_place())
            return self._update(observations, actions)

    def _step(self, optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
        """
        :param optimizer: An optimizer
        :param loss: The loss whose gradient it follows
        """
        flat = self._flat.get(optimizer)
        if flat is not None and flat.is_active:
            flat.step(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _update(self, observations: dict[str, th.Tensor], actions: th.Tensor) -> th.Tensor:
        """
        Update actor and entropy coefficient, then the critic, on the same minibatch (order of the paper's code).

        It is one function of tensors: nothing in it waits for the device or depends on a value, so that it runs as it is,
        compiled or as a CUDA graph.

        :param observations: Observations, with the goals that were reached later in place of the desired ones
        :param actions: Actions in [-1, 1], shape ``(batch_size, action_dim)``
        :return: What ``UPDATE_METRICS`` names
        """
        # Neither depends on the actor: computed once for both losses
        state_features = self.critic.extract_state_features(observations)
        goal_repr = self.critic.encode_goal(observations)

        # The critic is differentiated with respect to the actions only. Encoding policy and data actions in one pass would not
        # pay, as the latter need the gradients of the parameters too.
        with frozen(self.critic.sa_encoder):
            actor_loss, log_prob, ent_coef = self._actor_loss(observations, state_features.detach(), goal_repr.detach())
            self._step(self.actor.optimizer, actor_loss)
        # What its graph held serves the next one
        actor_loss = actor_loss.detach()

        # Optimize entropy coefficient, also called
        # entropy temperature or alpha in the paper
        ent_coef_losses = []
        if self.ent_coef_optimizer is not None and self.log_ent_coef is not None:
            assert isinstance(self.target_entropy, float)
            entropy_gap = (log_prob + self.target_entropy).mean()
            ent_coef_loss = -(self.log_ent_coef.exp() * entropy_gap).sum()
            self._step(self.ent_coef_optimizer, ent_coef_loss)
            ent_coef_losses.append(ent_coef_loss.detach())

        critic_loss, contrastive_metrics = self._critic_loss(state_features, actions, goal_repr)
        self._step(self.critic.optimizer, critic_loss)

        losses = [actor_loss, critic_loss.detach(), ent_coef.squeeze(), -log_prob.mean()]
        return th.stack([*losses, *contrastive_metrics, *ent_coef_losses])

    def _critic_loss(
        self, state_features: th.Tensor, actions: th.Tensor, goal_repr: th.Tensor
    ) -> tuple[th.Tensor, ContrastiveMetrics]:
        """
        :param state_features: Features of the states for the critic
        :param actions: Actions in [-1, 1], shape ``(batch_size, action_dim)``
        :param goal_repr: Representations of the goals, shape ``(batch_size, repr_dim)``
        :return: Loss of the critic (equation 2 of the paper with the penalty of its table 7) and what is logged of it
        """
        state_action_repr = self.critic.encode_state_action(state_features, actions)
        return info_nce(
            state_action_repr,
            goal_repr,
            self.critic.energy,
            self.contrastive_loss,
            self.logsumexp_coef,
            self.contrastive_chunk_size,
            fused=has_kernel(self.critic.g_encoder),
        )

    def _actor_loss(
        self, observations: dict[str, th.Tensor], state_features: th.Tensor, goal_repr: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param observations: Observations, with the goals that were reached later in place of the desired ones
        :param state_features: Features of the states for the critic
        :param goal_repr: Representations of the goals, shape ``(batch_size, repr_dim)``
        :return: Loss of the actor (equation 3 of the paper), log-probability of its actions of shape ``(batch_size,)``
            and entropy coefficient; no gradient flows through the latter two
        """
        batch_size = len(goal_repr)
        n_random = int(self.random_goals * batch_size)
        if n_random > 0:
            # The rows are in random order: take the goal of the next one
            order = th.arange(batch_size, device=goal_repr.device)
            order = th.where(order < n_random, (order + 1) % batch_size, order)
            goal_repr = goal_repr.index_select(0, order)
            observations = {**observations, GOAL_KEY: observations[GOAL_KEY].index_select(0, order)}

        actions_pi, log_prob = self.actor.action_log_prob(observations)
        ent_coef = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.detach().exp()
        values = rowwise_energy(self.critic.encode_state_action(state_features, actions_pi), goal_repr, self.critic.energy)
        return (ent_coef * log_prob - values).mean(), log_prob.detach(), ent_coef

    def learn(
        self: SelfDeepCRL,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DeepCRL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDeepCRL:
        """
        Return a trained model.

        :param total_timesteps: The total number of samples (env steps) to train on, rounded up to a multiple of the number
            of envs, or to whole episodes if ``train_freq`` counts them
        :param callback: callback(s) called at every step with state of the algorithm.
        :param log_interval: for off-policy algos, the number of episodes before logging.
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises ValueError: if a value from the env is NaN or infinite (naming the env and the key),
            except in the rewards, which are not needed
        """
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary containing parameters for different modules.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a nested dictionary
            containing nn.Module parameters used by the policy
        :param exact_match: If True, the given parameters should include parameters for each module and each of their
            parameters, otherwise raises an Exception
        :param device: Device on which the code should run.
        """
        super().set_parameters(load_path_or_dict, exact_match, device)
        # They may come from another device, where their steps were captured
        self._prepare_optimizers()

    @classmethod
    def load(
        cls: type[SelfDeepCRL],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs,
    ) -> SelfDeepCRL:
        """
        Load the model from a zip-file, see :meth:`~stable_baselines3.common.base_class.BaseAlgorithm.load`.
        No env is needed for prediction.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on
            (can be None if you only need prediction from a trained model)
        :param device: Device on which the code should run.
        :param custom_objects: Dictionary of objects to replace upon loading.
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training to avoid unexpected behavior.
        :param kwargs: extra arguments to change the model when loading
        :return: new model instance with loaded parameters
        :raises ValueError: if the file is the one of another algorithm,
            or if ``kwargs`` ask for other networks than the stored ones
        """
        stored, auto_settings = cls._stored_settings(path, custom_objects)
        custom_objects = {**dict.fromkeys(SCHEDULES), **(custom_objects or {})}
        asked = dict(kwargs.pop("policy_kwargs", None) or {})
        for name in ARCHITECTURE:
            for source in (custom_objects.get("policy_kwargs") or {}, custom_objects, kwargs):
                if name in source:
                    asked[name] = source[name]
            kwargs.pop(name, None)
        for name, value in asked.items() if stored else ():
            found = stored.get(name)
            if name in ("actor_depth", "critic_depth"):
                value, found = (depth or stored["depth"] for depth in (value, found))
            if found != value:
                raise ValueError(
                    f"The model in {path} was saved with `{name}={found!r}`, so that it cannot be loaded with "
                    f"`{name}={value!r}`: leave `{name}` out, or train a new model"
                )
        auto_settings = [name for name in auto_settings if name not in custom_objects]
        for name in auto_settings:
            kwargs.setdefault(name, "auto")
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        model._auto_settings = [name for name in auto_settings if kwargs[name] == "auto"]
        return model

    @staticmethod
    def _stored_settings(
        path: str | pathlib.Path | io.BufferedIOBase, custom_objects: dict[str, Any] | None
    ) -> tuple[dict[str, Any], list[str]]:
        """
        :param path: path to the file (or a file-like) of a saved model
        :param custom_objects: Dictionary of objects to replace upon loading
        :return: The policy kwargs that it was saved with, defaults included, and the names of the settings that were left
            at "auto"; nothing if it is not a saved model at all
        :raises ValueError: if the model is the one of another algorithm
        """
        file = open_path(path, "r", suffix="zip")
        try:
            with zipfile.ZipFile(file) as archive:
                data = json.loads(archive.read("data"))
        except (zipfile.BadZipFile, KeyError):
            # Stable-Baselines3 has its own error messages for these
            return {}, []
        finally:
            if file is path:
                file.seek(0)
            else:
                file.close()
        # What only DeepCRL has; the user may have excluded one of them
        if not {"contrastive_loss", "logsumexp_coef", "random_goals"} & data.keys():
            saved_by = data.get("policy_class", {}).get("__module__", "unknown")
            raise ValueError(
                f"{path} was not saved by DeepCRL, but by an algorithm whose policy is in `{saved_by}`: "
                "load it with that algorithm"
            )
        # The architecture stands in attributes of its own, whatever is done with `policy_kwargs`
        policy_kwargs, architecture = (
            {name: data[name] for name in names if name in data} for names in (("policy_kwargs",), ARCHITECTURE)
        )
        stored = json_to_data(json.dumps(policy_kwargs), custom_objects).get("policy_kwargs") or {}
        stored = {**stored, **json_to_data(json.dumps(architecture))}
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(DeepCRLPolicy).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        return {**defaults, **stored}, data.get("_auto_settings", [])

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file. If it is interrupted,
        the previous file stays as it was.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        if isinstance(path, (str, pathlib.Path)):
            with atomic_path(path, ".zip") as temporary:
                super().save(temporary, exclude, include)
        else:
            super().save(path, exclude, include)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as a pickle file. If it is interrupted, the previous file stays as it was.

        :param path: Path to the file where the replay buffer should be saved.
            if path is a str or pathlib.Path, the path is automatically created if necessary.
        """
        if isinstance(path, (str, pathlib.Path)):
            with atomic_path(path, ".pkl") as temporary:
                super().save_replay_buffer(temporary)
        else:
            super().save_replay_buffer(path)

    def load_replay_buffer(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        truncate_last_traj: bool = True,
    ) -> None:
        """
        Load a replay buffer from a pickle file. No env is needed.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: If set to ``True``, we assume that the last trajectory in the replay buffer was finished
            (and truncate it). If set to ``False``, we assume that we continue the same trajectory (same episode).
        :raises ValueError: if it is another kind of buffer or one of another env or number of envs;
            the buffer in use is kept then
        """
        loaded = load_from_pkl(path, self.verbose)
        if not isinstance(loaded, ContrastiveReplayBuffer):
            raise ValueError(f"{path} holds a {type(loaded).__name__}, but DeepCRL needs a ContrastiveReplayBuffer")
        if loaded.observation_space != self.observation_space or loaded.action_space != self.action_space:
            raise ValueError(
                f"The replay buffer in {path} is of another env: its spaces are {loaded.observation_space} and "
                f"{loaded.action_space}, those of the model {self.observation_space} and {self.action_space}"
            )
        if loaded.n_envs != self.n_envs:
            raise ValueError(
                f"The replay buffer in {path} was filled by {loaded.n_envs} envs, but the model has {self.n_envs}: "
                f"load the model with an env of {loaded.n_envs} envs"
            )
        if truncate_last_traj:
            loaded.truncate_last_trajectory()
        # Update saved replay buffer device to match current setting
        loaded.device = self.device
        loaded.on_device = self.replay_buffer_kwargs.get("on_device", False)
        self.replay_buffer = loaded

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "critic", *SCHEDULES, "_compiled", "_flat", "_graphed_update"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "actor.optimizer", "critic.optimizer"]
        if self.ent_coef_optimizer is not None:
            saved_pytorch_variables = ["log_ent_coef"]
            state_dicts.append("ent_coef_optimizer")
        else:
            saved_pytorch_variables = ["ent_coef_tensor"]
        return state_dicts, saved_pytorch_variables
