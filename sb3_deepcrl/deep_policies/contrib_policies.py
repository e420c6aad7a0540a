"""
Deep residual policies for the algorithms of sb3-contrib.
"""

from functools import partial
from typing import Any

import torch as th
from gymnasium import spaces
from sb3_contrib.common.torch_layers import BatchRenorm1d
from sb3_contrib.crossq import policies as crossq
from sb3_contrib.qrdqn import policies as qrdqn
from sb3_contrib.tqc import policies as tqc
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_deepcrl.common.torch_layers import Norm
from sb3_deepcrl.common.utils import check_choice
from sb3_deepcrl.deep_policies.policies import DeepContinuousPolicy, DeepPolicy, greedy_actions


class DeepTQCPolicy(DeepContinuousPolicy, tqc.TQCPolicy):
    """Deep residual policy for TQC, see :class:`~sb3_deepcrl.deep_policies.policies.DeepPolicy`."""


class DeepTQCCnnPolicy(DeepTQCPolicy, tqc.CnnPolicy):
    """Deep residual policy for TQC and images, see :class:`~sb3_deepcrl.deep_policies.policies.DeepPolicy`."""


class DeepTQCMultiInputPolicy(DeepTQCPolicy, tqc.MultiInputPolicy):
    """Deep residual policy for TQC and Dict observations, see :class:`~sb3_deepcrl.deep_policies.policies.DeepPolicy`."""


class DeepCrossQPolicy(DeepContinuousPolicy, crossq.CrossQPolicy):
    """
    Deep residual policy for CrossQ, see :class:`~sb3_deepcrl.deep_policies.policies.DeepPolicy`.

    CrossQ has no target networks. What keeps it stable in their place is batch normalization of every layer, with
    statistics over the actions of the replay buffer and of the policy together. So the towers have CrossQ's batch
    renormalization wherever those of the other algorithms have layer normalization, and as in CrossQ's own networks there
    is one of the inputs and one in front of the heads.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param norm: Normalization after each hidden Dense layer: ``"batch_renorm"``, ``"layer"`` or ``"none"``
    :param batch_norm: Whether inputs and features in front of the heads are normalized, too
    :param batch_norm_momentum: The rate of convergence for the batch renormalization statistics
    :param batch_norm_eps: A small value added to the variance to prevent division by zero
    :param renorm_warmup_steps: Number of steps to warm up BatchRenorm statistics before the running statistics
        are used for normalization
    :param kwargs: The other arguments of ``DeepPolicy`` and of sb3-contrib's ``CrossQPolicy``
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        norm: Norm | dict[str, Norm] = "batch_renorm",
        batch_norm: bool = True,
        batch_norm_momentum: float = 0.01,
        batch_norm_eps: float = 0.001,
        renorm_warmup_steps: int = 100_000,
        **kwargs: Any,
    ):
        renorm = partial(BatchRenorm1d, eps=batch_norm_eps, momentum=batch_norm_momentum, warmup_steps=renorm_warmup_steps)
        # The name stands for the class with CrossQ's settings; a saved policy has that class already
        norms = norm if isinstance(norm, dict) else dict.fromkeys(self.tower_names, norm)
        for value in norms.values():
            if isinstance(value, str):
                check_choice(value, ("batch_renorm", "layer", "none"), "norm")
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            norm={name: renorm if value == "batch_renorm" else value for name, value in norms.items()},
            batch_norm=batch_norm,
            batch_norm_momentum=batch_norm_momentum,
            batch_norm_eps=batch_norm_eps,
            renorm_warmup_steps=renorm_warmup_steps,
            **kwargs,
        )


class DeepQRDQNPolicy(DeepPolicy, qrdqn.QRDQNPolicy):
    """Deep residual policy for QR-DQN, see :class:`~sb3_deepcrl.deep_policies.policies.DeepPolicy`."""

    tower_names = ("qf",)

    def _predict(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        return greedy_actions(self.quantile_net(obs).mean(dim=1))

    def make_quantile_net(self) -> qrdqn.QuantileNetwork:
        """Make a quantile network with a residual tower."""
        network = super().make_quantile_net()
        self._deepen("qf", network.quantile_net)
        return network


class DeepQRDQNCnnPolicy(DeepQRDQNPolicy, qrdqn.CnnPolicy):
    """Deep residual policy for QR-DQN and images, see :class:`~sb3_deepcrl.deep_policies.policies.DeepPolicy`."""


class DeepQRDQNMultiInputPolicy(DeepQRDQNPolicy, qrdqn.MultiInputPolicy):
    """Deep residual policy for QR-DQN and Dict observations, see :class:`~sb3_deepcrl.deep_policies.policies.DeepPolicy`."""
