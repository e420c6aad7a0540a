import io
import math
import pathlib
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file, save_to_pkl
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

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer, check_finite, replace_her_replay_buffer
from sb3_deepcrl.common.cuda_graphs import check_cuda_graph, graph_key, set_learning_rate
from sb3_deepcrl.common.distributed import Ranks
from sb3_deepcrl.common.losses import CONTRASTIVE_LOSSES, NETWORK_METRICS, ContrastiveMetrics, info_nce, rowwise_energy
from sb3_deepcrl.common.running_norm import check_normalized_once, warn_of_clipped_goals
from sb3_deepcrl.common.torch_layers import frozen
from sb3_deepcrl.common.tower_kernel import has_kernel
from sb3_deepcrl.common.update_runner import UpdateRunner
from sb3_deepcrl.common.utils import (
    atomic_path,
    check_batch_size,
    check_buffer_size,
    check_choice,
    check_class,
    check_dict,
    check_kind_of_ent_coef,
    check_learning_rate,
    check_number,
    check_positive_int,
    env_state,
    is_left_alone,
    keep_normalization,
    parse_ent_coef,
    parse_number,
    update_schedule,
    warn_of_mixed_episodes,
)
from sb3_deepcrl.deepcrl.offline import OfflineLearning
from sb3_deepcrl.deepcrl.policies import GOAL_KEY, Actor, ContrastiveCritic, DeepCRLPolicy, check_observation_space
from sb3_deepcrl.deepcrl.tensor_rollout import collect_tensors
from sb3_deepcrl.env_ids import find_spec

SelfDeepCRL = TypeVar("SelfDeepCRL", bound="DeepCRL")

# A train() call holds no more sampled transitions than that at a time, in bytes
MAX_SAMPLE_BYTES = 2**28
# Arguments that are those of the policy
SHORTCUTS = ("depth", "width", "normalize_observations")
# What `_update` returns, in order, followed by "ent_coef_loss" where the coefficient is learned
UPDATE_METRICS = ("actor_loss", "critic_loss", "ent_coef", "entropy", *NETWORK_METRICS, *ContrastiveMetrics._fields)


class DeepCRL(OfflineLearning):
    """
    Deep contrastive reinforcement learning: goal-conditioned, self-supervised (the reward is not used), with residual
    networks of any depth.
    Paper: https://arxiv.org/abs/2503.14858 (1000 Layer Networks for Self-Supervised RL)
    The critic learns by InfoNCE (equation 2) to tell the goals that a state and action lead to from those of other
    transitions; the actor is a maximum entropy policy that maximizes the critic (equation 3). The observation of the env is
    a Dict with the keys ``achieved_goal`` and ``desired_goal``, and usually ``observation``; it needs no ``compute_reward``.

    :param policy: The policy model to use (``MultiInputPolicy``)
    :param env: The environment to learn from (can be an id, also of gymnasium-robotics or ``"panda_gym:PandaReach-v3"``)
    :param learning_rate: learning rate of all optimizers, it can be a function of the progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer, over all envs
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update, at least 2: the other rows are the negatives of the loss
    :param tau: not used, accepted for compatibility with SAC (there is no target network)
    :param gamma: the discount factor: goals are the state ``k`` steps later with probability proportional to ``gamma^k``
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``. 1 if only ``gradient_steps`` is given.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``). Set to ``-1`` means to do as
        many gradient steps as steps done in the environment during the rollout. 1 if only ``train_freq`` is given.
    :param action_noise: the action noise type (None by default), cf ``common.noise`` of Stable-Baselines3
    :param replay_buffer_class: :class:`~sb3_deepcrl.common.buffers.ContrastiveReplayBuffer` or a subclass of it
        (``HerReplayBuffer`` is replaced by it with a warning)
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: must be False, the replay buffer always stores observations once
    :param n_steps: must be 1, there are no n-step returns in contrastive RL
    :param ent_coef: Entropy regularization coefficient, 'auto' to learn it ('auto_0.1' with 0.1 as initial value)
    :param target_update_interval: not used, accepted for compatibility with SAC (there is no target network)
    :param target_entropy: target entropy when learning ``ent_coef``. ``"auto"`` is minus half the dimension of the actions
        (SAC: minus the dimension), or 0.75 of the largest entropy of discrete ones, that of drawing them uniformly
    :param transitions_per_update: Do one gradient step for so many transitions, whatever the number of envs, unless
        ``train_freq`` or ``gradient_steps`` is given
    :param depth: Number of Dense layers inside the residual blocks of the actor and of each encoder of the critic, a multiple
        of 4, by default 16; the first and the last layer are not counted (short for ``policy_kwargs=dict(depth=...)``)
    :param width: Number of units of every hidden layer, by default 256 (short for ``policy_kwargs=dict(width=...)``)
    :param contrastive_loss: Which way InfoNCE chooses: ``"forward"`` (a goal for each state and action, the paper's),
        ``"backward"`` or ``"symmetric"``
    :param logsumexp_coef: Coefficient of the log-sum-exp penalty
    :param random_goals: Fraction of the minibatch for which the actor is trained on the goal of another transition, instead of
        one that its own episode reached later (the paper's code: 0). The latter are mostly near: it has to practice far ones.
    :param bc_coef: Coefficient of behavior cloning in :meth:`learn_offline`, where the values in the loss of the actor are
        divided by their mean size then (DDPG+BC of OGBench, https://arxiv.org/abs/2410.20092, with 0.03 to 0.3 for its CRL)
    :param critic_learning_rate: learning rate of the critic, ``learning_rate`` by default
    :param ent_coef_learning_rate: learning rate of the entropy coefficient, ``learning_rate`` by default
    :param compile: Whether to compile the networks, see :func:`~sb3_deepcrl.common.compilation.compile_blocks`. ``"auto"``
        does it on GPUs, and on CPUs with AVX2 or AVX-512 if ``learn()`` is long enough to earn it.
    :param cuda_graph: Whether to run the updates, and the policy in ``predict``, as CUDA graphs. ``"auto"`` does it on GPUs.
    :param precision: ``"float32"``, ``"tf32"`` (on GPUs, as in the paper's code) or ``"bfloat16"`` for the matrix products of
        the networks; parameters, optimizers, residual sums and losses are float32 in any case. ``"auto"`` is TF32 on GPUs,
        and bfloat16 on CPUs that have it.
    :param checkpoint_activations: Whether to compute the inside of residual blocks again in the backward pass instead of
        keeping it: less memory, about one third more work
    :param normalize_observations: Whether actor and critic normalize observations by running statistics of the model, see
        :class:`~sb3_deepcrl.common.running_norm.RunningNorm` (short for ``policy_kwargs=dict(normalize_observations=...)``)
    :param use_sde: must be False, generalized State Dependent Exploration (gSDE) is not supported
    :param sde_sample_freq: not used, accepted for compatibility with SAC
    :param use_sde_at_warmup: not used, accepted for compatibility with SAC
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, for instance ``critic_depth`` or
        ``energy``, see :class:`~sb3_deepcrl.deepcrl.policies.DeepCRLPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run, the GPU if possible by default
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range, the env has no goals, or, later on, an observation is NaN or
        infinite: nothing learns from it, and ``VecNormalize`` gets the statistics back that it had before
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = dict.fromkeys(
        ("MlpPolicy", "CnnPolicy", "MultiInputPolicy"), DeepCRLPolicy
    )
    policy: DeepCRLPolicy
    actor: Actor
    critic: ContrastiveCritic
    replay_buffer: ContrastiveReplayBuffer | None
    _env_state: list[Any] | None = None  # After the last rollout

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
        train_freq: int | tuple[int, str] | None = None,
        gradient_steps: int | None = None,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto_0.1",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        transitions_per_update: int = 16,
        depth: int | None = None,
        width: int | None = None,
        contrastive_loss: str = "forward",
        logsumexp_coef: float = 0.1,
        random_goals: float = 0.5,
        bc_coef: float = 0.0,
        critic_learning_rate: float | Schedule | None = None,
        ent_coef_learning_rate: float | Schedule | None = None,
        compile: bool | str = "auto",
        cuda_graph: bool | str = "auto",
        precision: str = "float32",
        checkpoint_activations: bool = False,
        normalize_observations: bool | None = None,
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
        super().__init__(
            policy,
            find_spec(env).id if isinstance(env, str) else env,
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
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            sde_support=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
            support_multi_env=True,
        )

        self.target_entropy = target_entropy
        self.log_ent_coef = None  # type: th.Tensor | None
        # Entropy coefficient / Entropy temperature: inverse of the reward scale
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.ent_coef_optimizer: th.optim.Adam | None = None
        # None where `train_freq` and `gradient_steps` say it
        self.transitions_per_update: int | None = transitions_per_update
        check_dict(policy_kwargs, "policy_kwargs")
        self.depth, self.width, self.normalize_observations = depth, width, normalize_observations
        for name in SHORTCUTS:
            value = getattr(self, name)
            if value is not None and self.policy_kwargs.get(name, value) != value:
                raise ValueError(f"`{name}={value}` contradicts `policy_kwargs={policy_kwargs}`: give it once")
        self.contrastive_loss, self.logsumexp_coef = contrastive_loss, logsumexp_coef
        self.random_goals, self.bc_coef = random_goals, bc_coef
        self.critic_learning_rate = critic_learning_rate
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.compile = compile
        self.cuda_graph = check_cuda_graph(cuda_graph, self.device)
        self.precision = precision
        self.checkpoint_activations = checkpoint_activations
        # Number of steps by which the next rollout is longer, see `collect_rollouts`
        self._missing_steps = 0
        self._warned_of_copies = self._checked_goals = False
        self._logged_timesteps: int | None = None  # At the last dump of the logger

        if _init_setup_model:
            self._setup_model()

    def __getstate__(self) -> dict[str, Any]:
        if "_runner" in vars(self):
            self._runner.release()
        # A copied env may start afresh, so that a copied model has to reset it
        return {**self.__dict__, "_last_obs": None, "_env_state": None}

    def _setup_model(self) -> None:
        shortcuts = {name: value for name in SHORTCUTS if (value := getattr(self, name)) is not None}
        self.policy_kwargs = {**shortcuts, **self.policy_kwargs}
        self._check_arguments()
        self.replay_buffer_class, self.replay_buffer_kwargs = replace_her_replay_buffer(
            self.replay_buffer_class or ContrastiveReplayBuffer, self.replay_buffer_kwargs
        )
        if self.train_freq is None and self.gradient_steps is None:
            vars(self).update(update_schedule(self.n_envs, self.transitions_per_update))
        else:
            self.transitions_per_update = None
            self.train_freq = 1 if self.train_freq is None else self.train_freq
            self.gradient_steps = 1 if self.gradient_steps is None else self.gradient_steps
        self._ranks = Ranks()
        super()._setup_model()
        self._ranks.seed(self)
        vars(self).update({name: self.policy._get_constructor_parameters()[name] for name in SHORTCUTS})
        assert self.replay_buffer is not None
        self.replay_buffer.gamma = self.gamma
        self._create_aliases()
        # Target entropy is used when learning the entropy coefficient
        given = self.actor.target_entropy if self.target_entropy == "auto" else self.target_entropy
        self.target_entropy = parse_number(given, "target_entropy", '"auto"')

        # The entropy coefficient or entropy can be learned automatically
        value, is_learned = parse_ent_coef(self.ent_coef)
        if is_learned:
            self.log_ent_coef = th.log(th.ones(1, device=self.device) * value).requires_grad_(True)
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))
        else:
            self.ent_coef_tensor = th.tensor(value, device=self.device)
        self._runner = UpdateRunner(self._update, self.policy, self._optimizers, self._ranks)
        self._setup_acceleration(None)

    def _check_arguments(self) -> None:
        """Check what neither Stable-Baselines3 nor the policy nor the replay buffer checks."""
        hint = 'leave it at "MultiInputPolicy", and load a model with the algorithm that saved it'
        check_class(self.policy_class, DeepCRLPolicy, "policy", hint)
        check_observation_space(getattr(self, "observation_space", None))
        check_positive_int(self.buffer_size, "buffer_size")
        check_batch_size(self.batch_size)
        for name in ("learning_starts", "logsumexp_coef", "bc_coef"):
            check_number(getattr(self, name), name)
        check_number(self.gamma, "gamma", maximum=1.0)
        check_number(self.random_goals, "random_goals", maximum=1.0)
        check_choice(self.contrastive_loss, CONTRASTIVE_LOSSES, "contrastive_loss")
        for name in ("critic_learning_rate", "ent_coef_learning_rate"):
            setattr(self, name, check_learning_rate(getattr(self, name), name))
        if self.gradient_steps not in (None, -1, 0):
            check_positive_int(self.gradient_steps, "gradient_steps")
        if self.n_steps != 1:
            raise ValueError(f"`n_steps` must be 1, got {self.n_steps}: contrastive RL bootstraps from no return")
        if self.action_noise is not None and not isinstance(self.action_space, spaces.Box):
            raise ValueError(f"`action_noise` needs continuous actions, not {self.action_space}: use `ent_coef`")
        if self.use_sde:
            raise ValueError("`use_sde=True` is not supported: use `ent_coef` or `action_noise` for more exploration")

    def _setup_acceleration(self, n_updates: int | None) -> None:
        """Let networks and updates run as the arguments say, for so many updates; without any, only check them."""
        check_normalized_once(self.policy.normalize_observations, self._vec_normalize_env)
        self._runner.set_up(self.compile, self.cuda_graph, self.precision, self.checkpoint_activations, n_updates)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        return optimizers if self.ent_coef_optimizer is None else [*optimizers, self.ent_coef_optimizer]

    def _graph_key(self) -> tuple[Hashable, ...]:
        settings = (self.logsumexp_coef, self.random_goals, self._bc_coef, self.contrastive_loss, self.target_entropy)
        ent_coef = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef
        return graph_key((*settings, self.critic.energy), self._optimizers(), [ent_coef])

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
        self._convert_train_freq()
        assert self.replay_buffer is not None and isinstance(self.train_freq, TrainFreq)
        n_steps = check_positive_int(self.train_freq.frequency, "train_freq") * self._ranks.n_envs(self.n_envs)
        self._setup_acceleration(total_timesteps * max(self.gradient_steps, 1) // n_steps)
        if self.env is not None:
            check_buffer_size(self.buffer_size * self.n_envs // self._ranks.n_envs(self.n_envs), self.env)
            if not is_left_alone(self.env, self._env_state):
                self._last_obs = None
        if reset_num_timesteps or self._last_obs is None:
            # The envs are about to be reset
            self.replay_buffer.truncate_last_trajectory()
        with keep_normalization(self._vec_normalize_env):
            result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
            warn_of_mixed_episodes(result[1], self.env)  # type: ignore[arg-type]
            last_obs, self._last_obs = self._last_obs, None
            # Raises with no observation left behind, so that the next call resets the envs again
            check_finite(last_obs if self._vec_normalize_env is None else self._last_original_obs)  # type: ignore[arg-type]
            self._last_obs = last_obs
        return result

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # Some envs, or an episode, may go beyond the end
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, train_freq: TrainFreq, *args: Any, **kwargs: Any
    ) -> RolloutReturn:
        """
        Collect experiences and store them into a ``ReplayBuffer``. The last rollout of ``learn()`` ends with it: with all its
        updates if half of it is done, else with none. The first one of the next ``learn()`` is longer or shorter by that, so
        that the ratio of updates to steps does not depend on how a training is divided.
        """
        frequency, n_short = train_freq.frequency, 0
        n_left = math.ceil((self._total_timesteps - self.num_timesteps) / self._ranks.n_envs(env.num_envs))
        if train_freq.unit == TrainFrequencyUnit.STEP and n_left > 0:
            # Another number of envs, or the user, may have made rollouts shorter since
            n_wanted = max(frequency + min(self._missing_steps, frequency - 1), 1)
            n_short = max(n_wanted - n_left, 0)
            train_freq = TrainFreq(n_wanted - n_short, train_freq.unit)
        self._missing_steps = 0
        continue_training = False
        try:
            with keep_normalization(self._vec_normalize_env):
                rollout = collect_tensors(self, env, callback, train_freq, *args, **kwargs)
                rollout = rollout or super().collect_rollouts(env, callback, train_freq, *args, **kwargs)
            continue_training = rollout.continue_training
        finally:
            self._ranks.update_statistics(self.actor.normalizer)
            self._env_state = env_state(env)
            if not continue_training:
                # The last transition was not stored: the envs went on without us, and have to be reset
                self._last_obs = None
        if n_short > 0 and continue_training and self.gradient_steps >= 0:
            has_updates = 2 * n_short <= frequency and self.num_timesteps > self.learning_starts
            self._missing_steps = n_short if has_updates else n_short - frequency
            return rollout._replace(continue_training=has_updates)
        return self._ranks.whole(rollout)

    def _store_transition(self, replay_buffer: ReplayBuffer, buffer_action: np.ndarray, new_obs: Any, *args: Any) -> None:
        # The replay buffer checks what it stores, but sees the first observations after `dones` after an update only
        if np.asarray(args[1]).any():
            check_finite(new_obs if self._vec_normalize_env is None else self._vec_normalize_env.get_original_obs())  # type: ignore[arg-type]
        last_obs = self._last_obs
        super()._store_transition(replay_buffer, buffer_action, new_obs, *args)
        if self.actor.normalizer is not None:
            self.actor.normalizer.add(last_obs)  # type: ignore[arg-type]

    def dump_logs(self) -> None:
        # Where episodes of several envs end at the same step, once for all of them
        if self._logged_timesteps != self.num_timesteps or self.logger.name_to_value:
            self._logged_timesteps = self.num_timesteps
            super().dump_logs()

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer once and do the updates, each on a minibatch of its own.

        :param gradient_steps: Number of updates
        :param batch_size: Number of transitions in a minibatch, at least 2
        """
        check_batch_size(batch_size)
        if gradient_steps < 1 or not self._ranks.begin_updates(self):
            return
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        # Update learning rates according to their schedule. SB3 only logs it: an optimizer in a graph has its own way
        self._update_learning_rate([])
        learning_rates = (None, self.critic_learning_rate, self.ent_coef_learning_rate)
        for optimizer, learning_rate in zip(self._optimizers(), learning_rates, strict=False):
            schedule = self.lr_schedule if learning_rate is None else FloatSchedule(learning_rate)
            set_learning_rate(optimizer, schedule(self._current_progress_remaining))
        batch_size = self._ranks.split(batch_size)
        self._warned_of_copies = self._warned_of_copies or self.replay_buffer.warn_of_copies(batch_size)
        self.replay_buffer.gamma = self.gamma
        steps_at_once = max(1, MAX_SAMPLE_BYTES // (self.replay_buffer.transition_bytes * batch_size))
        key = None if self._runner.graph is None else self._graph_key()
        metrics: list[th.Tensor] = []
        while len(metrics) < gradient_steps:
            n_steps = min(steps_at_once, gradient_steps - len(metrics))
            observations, actions = self.replay_buffer.sample_contrastive(n_steps * batch_size, env=self._vec_normalize_env)
            if not self._checked_goals and self.n_envs + self._episode_num > 2:
                # Its statistics need the goals of a few episodes
                self._checked_goals = warn_of_clipped_goals(observations[GOAL_KEY], self._vec_normalize_env)
            for start in range(0, n_steps * batch_size, batch_size):
                rows = slice(start, start + batch_size)
                minibatch = {name: values[rows] for name, values in observations.items()}
                metrics.append(self._runner.run(minibatch, actions[rows], key))
        self._n_updates += gradient_steps

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        names = UPDATE_METRICS if self.ent_coef_optimizer is None else (*UPDATE_METRICS, "ent_coef_loss")
        # The only time in each call that the host waits for the device
        for name, value in zip(names, self._ranks.mean(th.stack(metrics).mean(dim=0)).tolist(), strict=True):
            self.logger.record(f"train/{name}", value)

    def _update(self, observations: dict[str, th.Tensor], actions: th.Tensor) -> th.Tensor:
        """
        Update actor, entropy coefficient and critic on the same minibatch, each by what the others were before (as the paper's
        code does). It is one function of tensors: nothing in it waits for the device or depends on a value.

        :param observations: Observations, with the goals that were reached later in place of the desired ones
        :param actions: Actions in [-1, 1] or discrete ones, shape ``(batch_size, action_dim)``
        :return: What ``UPDATE_METRICS`` names
        """
        # Neither depends on the actor: computed once for both losses
        state_features = self.critic.extract_state_features(observations)
        goal_branch, critic_branch = self._runner.fork()
        with goal_branch.beside():
            goal_repr = self._ranks.gather(self.critic.encode_goal(observations))

        # The critic is differentiated with respect to the actions only. Encoding policy and data actions in one pass would not
        # pay, as the latter need the gradients of the parameters too.
        with frozen(self.critic.sa_encoder):
            features = state_features.detach(), goal_repr.detach()
            actor_loss, log_prob, ent_coef, output = self._actor_loss(observations, *features, actions)
            self._runner.backward(self.actor.optimizer, actor_loss)
        # What its graph held serves the next one
        actor_loss = actor_loss.detach()

        # Optimize entropy coefficient, also called entropy temperature or alpha in the paper
        ent_coef_losses = []
        if self.ent_coef_optimizer is not None and self.log_ent_coef is not None:
            assert isinstance(self.target_entropy, float)
            ent_coef_loss = -(self.log_ent_coef.exp() * (log_prob + self.target_entropy).mean()).sum()
            self._runner.backward(self.ent_coef_optimizer, ent_coef_loss)
            ent_coef_losses.append(ent_coef_loss.detach())

        with critic_branch.beside():
            goal_branch.join()
            critic_loss, contrastive_metrics = self._critic_loss(state_features, actions, goal_repr)
            self._runner.backward(self.critic.optimizer, critic_loss)
        self._runner.join()
        # After all gradients, which need the networks as they were
        grad_norms = self._runner.step(*self._optimizers())[:2]

        losses = [actor_loss, critic_loss.detach(), ent_coef.squeeze(), -log_prob.mean()]
        return th.stack([*losses, output, *grad_norms, *contrastive_metrics, *ent_coef_losses])

    def _critic_loss(
        self, state_features: th.Tensor, actions: th.Tensor, goal_repr: th.Tensor
    ) -> tuple[th.Tensor, ContrastiveMetrics]:
        """Compute the loss of the critic (equation 2 of the paper with the penalty of its table 7) and its metrics."""
        state_action_repr = self._ranks.gather(self.critic.encode_state_action(state_features, actions))
        settings = (self.critic.energy, self.contrastive_loss, self.logsumexp_coef)
        with self._runner.float32_products():
            return info_nce(state_action_repr, goal_repr, *settings, fused=has_kernel(self.critic.g_encoder))

    def _actor_loss(
        self, observations: dict[str, th.Tensor], state_features: th.Tensor, goal_repr: th.Tensor, actions: th.Tensor
    ) -> tuple[th.Tensor, ...]:
        """Compute the loss of the actor (equation 3) and, detached, ``log_prob``, ``ent_coef`` and the size of its output."""
        batch_size = len(goal_repr)
        n_random = int(self.random_goals * batch_size)
        # The rows are in random order: take the goal of the next one
        ours = self._ranks.rows
        order = th.arange(ours.start or 0, ours.stop or batch_size, device=goal_repr.device)
        order = th.where(order < n_random, (order + 1) % batch_size, order)
        goals = self._ranks.gather(observations[GOAL_KEY]).index_select(0, order)

        def values_of(actions_pi: th.Tensor) -> th.Tensor:
            state_action_repr = self.critic.encode_state_action(state_features, actions_pi)
            self._runner.branches[0].join()
            rows = order.repeat_interleave(len(actions_pi) // len(order))
            return rowwise_energy(state_action_repr, goal_repr.index_select(0, rows), self.critic.energy)

        params = self.actor.get_action_dist_params({**observations, GOAL_KEY: goals})
        values, log_prob = self.actor.expected_value(params, values_of)
        ent_coef = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.detach().exp()
        loss = (ent_coef * log_prob - values).mean()
        if self._bc_coef > 0:
            loss = loss / values.detach().abs().mean().clamp(min=1e-6)
            loss = loss + self._bc_coef * self.actor.cloning_loss(params, actions)
        return loss, log_prob.detach(), ent_coef, params[0].detach().abs().mean()

    def learn(
        self: SelfDeepCRL,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DeepCRL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDeepCRL:
        with self._ranks.training(self, callback, progress_bar) as (callback, progress_bar):
            return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        super().set_parameters(load_path_or_dict, exact_match, device)
        # They may come from another device, where their steps were captured, and are elsewhere than those of a graph
        self._runner.prepare_optimizers()

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
        No env is needed for prediction. What says how the networks are built may be given again; changing it is a ValueError.
        """
        shortcuts = {name: kwargs.pop(name) for name in SHORTCUTS if name in kwargs}
        if kwargs.get("transitions_per_update") is not None:
            kwargs = {"train_freq": None, "gradient_steps": None, **kwargs}
        if "ent_coef" in kwargs:
            check_kind_of_ent_coef(kwargs["ent_coef"], load_from_zip_file(path, load_data=False, device="cpu")[1])
        asked, custom_objects = kwargs.pop("policy_kwargs", None), {"lr_schedule": None, **(custom_objects or {})}
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        stored = {**model.policy._get_constructor_parameters(), **model.policy_kwargs}
        if "ent_coef" in kwargs and model.log_ent_coef is None:
            model.ent_coef_tensor.fill_(parse_ent_coef(model.ent_coef)[0])
        for name, value in {**kwargs, **(asked or {}), **shortcuts}.items():
            if name in stored and value != stored[name]:
                raise ValueError(
                    f"The model in {path} was saved with `{name}={stored[name]!r}`, so that it cannot be loaded with "
                    f"`{name}={value!r}`: leave `{name}` out, or train a new model"
                )
        return model

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        # If it is interrupted, the previous file stays as it was
        if self._ranks.rank == 0:
            with atomic_path(path, ".zip") as file:
                super().save(file, exclude, include)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        assert self.replay_buffer is not None
        if (replay_buffer := self._ranks.gather_buffer(self.replay_buffer)) is not None:
            with atomic_path(path, ".pkl") as file:
                save_to_pkl(file, replay_buffer, self.verbose)

    def _excluded_save_params(self) -> list[str]:
        # The schedule follows from the learning rate, which `custom_objects` may replace
        excluded = ["actor", "critic", "_runner", "_ranks", "lr_schedule", "_env_state"]
        if self.transitions_per_update is not None:
            # Chosen for the number of envs, which may be another one when the model is loaded
            excluded += ["train_freq", "gradient_steps"]
        return super()._excluded_save_params() + excluded

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "actor.optimizer", "critic.optimizer"]
        if self.ent_coef_optimizer is None:
            return state_dicts, ["ent_coef_tensor"]
        return [*state_dicts, "ent_coef_optimizer"], ["log_ent_coef"]
