"""
The squashed Gaussian, as pure functions of tensors.
"""

import math
from typing import Any

import torch as th
from torch.nn import functional as F

from sb3_deepcrl.common.tower_kernel import fused_squashed_gaussian
from sb3_deepcrl.common.tracing import is_traced


class _SquashedGaussian(th.autograd.Function):
    """Its gradient worked out by hand takes a third of the operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: th.Tensor, log_std: th.Tensor, noise: th.Tensor, fused: bool) -> Any:
        if fused and not is_traced(mean, log_std, noise) and all(x.is_cpu and x.dtype is th.float32 for x in (mean, log_std)):
            return fused_squashed_gaussian(mean, log_std, noise)
        gaussian_action = th.addcmul(mean, log_std.exp(), noise)
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2.0 * (math.log(2.0) - gaussian_action - F.softplus(-2.0 * gaussian_action))
        return th.tanh(gaussian_action), log_prob.sum(dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[th.Tensor, ...], output: tuple[th.Tensor, ...]) -> None:
        ctx.save_for_backward(output[0], *inputs[1:3])

    @staticmethod
    def backward(ctx: Any, of_actions: th.Tensor, of_log_prob: th.Tensor) -> Any:
        actions, log_std, noise = ctx.saved_tensors
        of_log_prob = of_log_prob.unsqueeze(1)
        # The correction's derivative is 2 tanh(u)
        of_gaussian_action = th.addcmul(of_actions, actions, 2.0 * of_log_prob - actions * of_actions)
        return of_gaussian_action, th.addcmul(-of_log_prob, of_gaussian_action, log_std.exp() * noise), None, None


def squashed_gaussian(
    mean: th.Tensor, log_std: th.Tensor, noise: th.Tensor, fused: bool = False
) -> tuple[th.Tensor, th.Tensor]:
    """
    Reparametrized sample of a diagonal Gaussian squashed by tanh, with its log-probability
    (appendix C of the SAC paper, https://arxiv.org/abs/1801.01290).

    The correction ``log(1 - tanh(u)^2)`` is computed as ``2 (log 2 - u - softplus(-2 u))``, which is exact where the
    usual form saturates.

    :param mean: Mean before squashing, shape ``(batch_size, action_dim)``
    :param log_std: Log of the standard deviation before squashing, same shape
    :param noise: Standard normal noise, same shape
    :param fused: Whether it runs as one function in C++, on a CPU that has it
    :return: Actions in [-1, 1], shape ``(batch_size, action_dim)``, and their log-probability, shape ``(batch_size,)``
    """
    return _SquashedGaussian.apply(mean, log_std, noise, fused)  # type: ignore[no-any-return]
