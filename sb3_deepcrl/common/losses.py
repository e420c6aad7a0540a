"""
Energies and contrastive losses, as pure functions of tensors.

They hold no state, draw no random number and never synchronize with the host.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_deepcrl.common.tower_kernel import fused_info_nce
from sb3_deepcrl.common.tracing import is_traced
from sb3_deepcrl.common.utils import check_choice


def _unit(x: th.Tensor) -> th.Tensor:
    return F.normalize(x, dim=1)


_ENERGIES: dict[str, Callable[[th.Tensor, th.Tensor], th.Tensor]] = {
    # Its gradient where both are equal is zero in PyTorch, and not infinite
    "norm": lambda x, y: -th.linalg.vector_norm(x - y, dim=1),
    "squared": lambda x, y: -(x - y).square().sum(dim=1),
    "dot": lambda x, y: (x * y).sum(dim=1),
    "cosine": lambda x, y: (_unit(x) * _unit(y)).sum(dim=1),
}
ENERGIES = tuple(_ENERGIES)
CONTRASTIVE_LOSSES = ("forward", "backward", "symmetric")


def rowwise_energy(x: th.Tensor, y: th.Tensor, energy: str = "norm") -> th.Tensor:
    """
    Similarity of each row of ``x`` with the same row of ``y``.

    ``"norm"`` is the negative Euclidean distance (what table 7 of the paper calls L2), with gradient zero where two
    rows are equal; ``"squared"`` its negative square; ``"dot"`` the inner product; ``"cosine"`` the inner
    product of the rows scaled to length 1.

    :param x: Representations of shape ``(n, repr_dim)``
    :param y: Representations of shape ``(n, repr_dim)``
    :param energy: One of ``ENERGIES``
    :return: Energies of shape ``(n,)``
    :raises ValueError: if there is no such energy
    """
    return _ENERGIES[check_choice(energy, ENERGIES, "energy")](x, y)


#: What an update tells of the networks: the mean absolute value of the actor's means before the tanh, or of its
#: log-probabilities, and the norms of the gradients
NETWORK_METRICS = ("actor_output", "actor_grad_norm", "critic_grad_norm")


class ContrastiveMetrics(NamedTuple):
    """
    Scalars that tell how well the critic tells the positives apart, logged as ``train/`` with these names.

    :param categorical_accuracy: Fraction of the rows whose positive is above all others. Chance is one in ``batch_size``; a
        trained critic has 30 to 400 times as much. It need not come near 1: states that follow each other lead to like goals,
        and of several equal goals none is above all others.
    :param logits_pos: Mean logit of the positives; with ``energy="norm"`` and ``"squared"`` never above 0
    :param logits_neg: Mean logit of the negatives. Equal to ``logits_pos`` at the start, below it as soon as the critic learns
    :param logsumexp: Mean log-sum-exp of a row, which the log-sum-exp penalty keeps near 0
    """

    categorical_accuracy: th.Tensor
    logits_pos: th.Tensor
    logits_neg: th.Tensor
    logsumexp: th.Tensor


def _pairwise(x: th.Tensor, y: th.Tensor, energy: str) -> tuple[th.Tensor, th.Tensor, Callable[[th.Tensor], Any]]:
    """
    Energies of all pairs, shape ``(n, n)``; those of the positives once more, with the rounding that all other pairs have, so
    that equal goals have equal energies; and a function that makes the gradients of ``x`` and ``y`` from that of the energies,
    which it overwrites.
    """
    if energy in ("dot", "cosine"):
        rows, columns = (x, y) if energy == "dot" else (_unit(x), _unit(y))

        def gradients_of_products(gradient: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
            of_rows, of_columns = gradient @ columns, gradient.T @ rows
            if energy == "dot":
                return of_rows, of_columns
            # Only what is at a right angle to the row changes its direction
            return tuple(  # type: ignore[return-value]
                (of - (of * unit).sum(dim=1, keepdim=True) * unit) / scaled.norm(dim=1, keepdim=True).clamp(min=1e-12)
                for of, unit, scaled in ((of_rows, rows, x), (of_columns, columns, y))
            )

        products = rows @ columns.T
        return products, products.diagonal(), gradients_of_products

    # |x|^2 + |y|^2 - 2 x.y loses digits when both points are far from the origin: distances do not depend
    # on the origin, so put it in the middle of the points first.
    center = y.mean(dim=0, keepdim=True)
    x, y = x - center, y - center
    distances = th.addmm(x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1), x, y.T, alpha=-2.0).clamp_(min=0.0)
    # The positives may come so near to each other that what is left after cancellation is rounding
    difference = x - y
    rounded = distances.diagonal().clone()
    distances = distances.diagonal_scatter(difference.square().sum(dim=1))
    if energy == "norm":
        distances.sqrt_()
        rounded.sqrt_()

    def gradients_of_distances(gradient: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        # With w the gradients of the energies over the distances (zero where two rows are equal), times two without the root
        # in front: x_i has -sum_j w_ij (x_i - y_j), and y_j the opposite of it
        w = gradient.mul_(2.0) if energy == "squared" else gradient.div_(distances).masked_fill_(distances == 0.0, 0.0)
        of_positives = w.diagonal().clone().unsqueeze(1) * difference
        w.diagonal().zero_()
        of_x = w @ y - w.sum(dim=1, keepdim=True) * x - of_positives
        of_y = w.T @ x - w.sum(dim=0).unsqueeze(1) * y + of_positives
        return of_x, of_y

    return -distances, -rounded, gradients_of_distances


class _ContrastiveLoss(th.autograd.Function):
    """Loss and metrics as one tensor. The gradient is worked out by hand, with the loss: it needs no more than its logits."""

    @staticmethod
    def forward(
        ctx: Any, x: th.Tensor, y: th.Tensor, energy: str, contrastive_loss: str, logsumexp_coef: float, fused: bool
    ) -> Any:
        needed = any(ctx.needs_input_grad[:2])
        is_known = energy == "norm" and contrastive_loss == "forward" and not is_traced(x, y)
        if fused and is_known and all(value.is_cpu and value.dtype is th.float32 for value in (x, y)):
            outcome, *gradients = fused_info_nce(x, y, logsumexp_coef, needed)
        else:
            outcome, *gradients = _contrast(x, y, energy, contrastive_loss, logsumexp_coef, needed)
        ctx.save_for_backward(*gradients)
        loss, metrics = outcome.select(0, 0), outcome.narrow(0, 1, 4)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor, _: th.Tensor) -> Any:
        return *(gradient * saved for saved in ctx.saved_tensors), None, None, None, None


def _contrast(
    x: th.Tensor, y: th.Tensor, energy: str, contrastive_loss: str, logsumexp_coef: float, needed: bool
) -> tuple[th.Tensor, ...]:
    """Loss and metrics, shape ``(5,)``, and the gradients of ``x`` and ``y`` if they are needed."""
    n = len(x)
    logits, rounded, gradients_of = _pairwise(x, y, energy)
    positive, row_logsumexp = logits.diagonal().clone(), logits.logsumexp(dim=1, keepdim=True)
    directions = [] if contrastive_loss == "backward" else [row_logsumexp]
    if contrastive_loss != "forward":
        directions.append(logits.logsumexp(dim=0, keepdim=True))
    loss = -positive.mean()
    for logsumexp in directions:
        loss = loss + (logsumexp + logsumexp_coef * logsumexp.square()).mean() / len(directions)
    # Nobody else comes as near, so that representations that are all the same are wrong
    correct = (logits < rounded.unsqueeze(1)).fill_diagonal_(True).all(dim=1) & positive.isfinite()
    negative = (logits.sum() - positive.sum()) / (n * (n - 1))
    outcome = th.stack([loss, correct.to(x.dtype).mean(), positive.mean(), negative, row_logsumexp.mean()])
    if not needed:
        return (outcome,)
    softmaxes = (
        (logits - logsumexp).exp_().mul_((1.0 + 2.0 * logsumexp_coef * logsumexp) / (n * len(directions)))
        for logsumexp in directions
    )
    gradient = functools.reduce(th.Tensor.add_, softmaxes)
    gradient.diagonal().sub_(1.0 / n)
    return outcome, *gradients_of(gradient)


def info_nce(
    x: th.Tensor,
    y: th.Tensor,
    energy: str = "norm",
    contrastive_loss: str = "forward",
    logsumexp_coef: float = 0.0,
    fused: bool = False,
) -> tuple[th.Tensor, ContrastiveMetrics]:
    """
    InfoNCE with the log-sum-exp penalty: cross-entropy of picking the positive among all candidates (equation 2 of the
    paper), and ``logsumexp_coef`` times the mean square of their log-sum-exp. InfoNCE does not change when a constant is
    added to a row of logits; the penalty fixes the constant (table 7 of the paper, with a coefficient of 0.1).

    ``"forward"`` (the paper) picks the goal of each state-action pair among the goals, ``"backward"`` the
    state-action pair of each goal among the pairs, ``"symmetric"`` is the mean of both.

    :param x: Representations of state-action pairs, shape ``(batch_size, repr_dim)``
    :param y: Representations of their goals, shape ``(batch_size, repr_dim)``
    :param energy: One of ``ENERGIES``
    :param contrastive_loss: One of ``CONTRASTIVE_LOSSES``
    :param logsumexp_coef: Coefficient of the penalty
    :param fused: Whether the common case (``"norm"``, ``"forward"``) runs as one function in C++, on a CPU that has it
    :return: The loss, a scalar that can be differentiated once, and metrics without gradient
    :raises ValueError: if there is no such energy or loss
    """
    check_choice(energy, ENERGIES, "energy")
    check_choice(contrastive_loss, CONTRASTIVE_LOSSES, "contrastive_loss")
    loss, metrics = _ContrastiveLoss.apply(x, y, energy, contrastive_loss, logsumexp_coef, fused)
    return loss, ContrastiveMetrics(*metrics)
