import io
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_deepcrl.common.buffers import ContrastiveReplayBuffer, check_finite
from sb3_deepcrl.common.losses import (
    CONTRASTIVE_LOSSES,
    check_choice,
    contrastive_metrics,
    info_nce,
    logsumexp_penalty,
    pairwise_energy,
    rowwise_energy,
)
from sb3_deepcrl.deepcrl.policies import GOAL_KEY, Actor, CnnPolicy, ContrastiveCritic, DeepCRLPolicy, MlpPolicy, MultiInputPolicy

SelfDeepCRL = TypeVar("SelfDeepCRL", bound="DeepCRL")

# What `_update` returns, in order
UPDATE_METRICS = (
    "actor_loss",
    "critic_loss",
    "ent_coef",
    "ent_coef_loss",
    "entropy",
    "categorical_accuracy",
    "logits_pos",
    "logits_neg",
    "logsumexp",
)


class DeepCRL(OffPolicyAlgorithm):
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DeepCRLPolicy
    actor: Actor
    critic: ContrastiveCritic
    replay_buffer: ContrastiveReplayBuffer | None

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
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
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
        random_goals: float = 0.0,
        critic_learning_rate: float | Schedule | None = None,
        ent_coef_learning_rate: float | Schedule | None = None,
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
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=dict(depth=depth, actor_depth=actor_depth, critic_depth=critic_depth, width=width, repr_dim=repr_dim, energy=energy, **(policy_kwargs or {})),
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        self.target_entropy = target_entropy
        self.log_ent_coef = None  # type: th.Tensor | None
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.ent_coef_optimizer: th.optim.Adam | None = None
        self.contrastive_loss = contrastive_loss
        self.logsumexp_coef = logsumexp_coef
        self.random_goals = random_goals
        self.critic_learning_rate = critic_learning_rate
        self.ent_coef_learning_rate = ent_coef_learning_rate
        if _init_setup_model:
            self._setup_model()

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        f = lambda lr: self.lr_schedule if lr is None else FloatSchedule(lr)
        self.critic_lr_schedule = f(self.critic_learning_rate)
        self.ent_coef_lr_schedule = f(self.ent_coef_learning_rate)

    def _setup_model(self) -> None:
        self.replay_buffer_class = ContrastiveReplayBuffer
        super()._setup_model()
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        if self.target_entropy == "auto":
            self.target_entropy = -0.5 * float(np.prod(self.action_space.shape))
        else:
            self.target_entropy = float(self.target_entropy)
        if isinstance(self.ent_coef, str) and self.ent_coef.startswith("auto"):
            init_value = 1.0
            if "_" in self.ent_coef:
                init_value = float(self.ent_coef.split("_")[1])
            self.log_ent_coef = th.log(th.ones(1, device=self.device) * init_value).requires_grad_(True)
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.ent_coef_lr_schedule(1))
        else:
            self.ent_coef_tensor = th.tensor(float(self.ent_coef), device=self.device)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.actor.optimizer)
        update_learning_rate(self.critic.optimizer, self.critic_lr_schedule(self._current_progress_remaining))
        update_learning_rate(self.ent_coef_optimizer, self.ent_coef_lr_schedule(self._current_progress_remaining))
        self.replay_buffer.gamma = self.gamma
        observations, actions = self.replay_buffer.sample_contrastive(gradient_steps * batch_size, env=self._vec_normalize_env)
        metrics = []
        for start in range(0, gradient_steps * batch_size, batch_size):
            rows = slice(start, start + batch_size)
            metrics.append(self._update({k: o[rows] for k, o in observations.items()}, actions[rows]))
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in zip(UPDATE_METRICS, th.stack(metrics).mean(dim=0).tolist(), strict=True):
            self.logger.record(f"train/{name}", value)

    def _update(self, observations, actions):
        batch_size = len(actions)
        state_features = self.critic.extract_state_features(observations)
        goal_repr = self.critic.encode_goal(observations)
        n_random = int(self.random_goals * batch_size)
        actor_goals, actor_obs = goal_repr.detach(), observations
        if n_random > 0:
            order = th.cat([th.arange(1, n_random + 1) % batch_size, th.arange(n_random, batch_size)])
            actor_goals = actor_goals[order]
            actor_obs = {**observations, GOAL_KEY: observations[GOAL_KEY][order]}
        actions_pi, log_prob = self.actor.action_log_prob(actor_obs)
        ent_coef = self.log_ent_coef.detach().exp() if self.log_ent_coef is not None else self.ent_coef_tensor
        q = rowwise_energy(self.critic.encode_state_action(state_features.detach(), actions_pi), actor_goals, self.critic.energy)
        actor_loss = (ent_coef * log_prob - q).mean()
        self.actor.optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))
        self.actor.optimizer.step()
        ent_coef_loss = th.zeros(())
        if self.log_ent_coef is not None:
            ent_coef_loss = -(self.log_ent_coef.exp() * (log_prob + self.target_entropy).detach().mean()).sum()
            self.ent_coef_optimizer.zero_grad()
            ent_coef_loss.backward()
            self.ent_coef_optimizer.step()
        logits = pairwise_energy(self.critic.encode_state_action(state_features, actions), goal_repr, self.critic.energy)
        critic_loss = info_nce(logits, self.contrastive_loss) + self.logsumexp_coef * logsumexp_penalty(logits, self.contrastive_loss)
        self.critic.optimizer.zero_grad()
        critic_loss.backward()
        self.critic.optimizer.step()
        return th.stack([actor_loss.detach(), critic_loss.detach(), ent_coef.squeeze(), ent_coef_loss.detach(), -log_prob.detach().mean(), *contrastive_metrics(logits)])

    def learn(self, total_timesteps, callback=None, log_interval=4, tb_log_name="DeepCRL", reset_num_timesteps=True, progress_bar=False):
        return super().learn(total_timesteps=total_timesteps, callback=callback, log_interval=log_interval, tb_log_name=tb_log_name, reset_num_timesteps=reset_num_timesteps, progress_bar=progress_bar)

    def _excluded_save_params(self) -> list[str]:
        return super()._excluded_save_params() + ["actor", "critic"]  # noqa: RUF005
