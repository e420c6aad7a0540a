"""
Energies, contrastive losses and the squashed Gaussian, as pure functions of tensors.

They hold no state, draw no random number and never synchronise with the host.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def _safe_sqrt(squared: th.Tensor) -> th.Tensor:
    """Square root whose gradient at zero is zero and not infinite, with no bias elsewhere."""
    positive = squared > 0
    return th.where(positive, th.where(positive, squared, 1.0).sqrt(), 0.0)


def _pairwise_squared_distance(x: th.Tensor, y: th.Tensor, first: int | None) -> th.Tensor:
    # |x|^2 + |y|^2 - 2 x.y loses digits when both points are far from the origin: distances do not depend
    # on the origin, so put it in the middle of the points first.
    center = y.mean(dim=0, keepdim=True).detach()
    x, y = x - center, y - center
    squared = th.addmm(x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1), x, y.T, alpha=-2.0).clamp(min=0.0)
    if first is None:
        return squared
    # The positives may come so near to each other that what is left after cancellation is rounding
    return th.diagonal_scatter(squared, _rowwise_squared_distance(x, y.narrow(0, first, len(x))), offset=first)


def _rowwise_squared_distance(x: th.Tensor, y: th.Tensor) -> th.Tensor:
    return (x - y).square().sum(dim=1)


def _unit(x: th.Tensor) -> th.Tensor:
    return F.normalize(x, dim=1)


# Each energy: of all pairs of rows, and row by row
_ENERGIES: dict[
    str, tuple[Callable[[th.Tensor, th.Tensor, int | None], th.Tensor], Callable[[th.Tensor, th.Tensor], th.Tensor]]
] = {
    "norm": (
        lambda x, y, first: -_safe_sqrt(_pairwise_squared_distance(x, y, first)),
        lambda x, y: -_safe_sqrt(_rowwise_squared_distance(x, y)),
    ),
    "squared": (
        lambda x, y, first: -_pairwise_squared_distance(x, y, first),
        lambda x, y: -_rowwise_squared_distance(x, y),
    ),
    "dot": (
        lambda x, y, first: x @ y.T,
        lambda x, y: (x * y).sum(dim=1),
    ),
    "cosine": (
        lambda x, y, first: _unit(x) @ _unit(y).T,
        lambda x, y: (_unit(x) * _unit(y)).sum(dim=1),
    ),
}
ENERGIES = tuple(_ENERGIES)
CONTRASTIVE_LOSSES = ("forward", "backward", "symmetric")


def check_choice(value: str, choices: tuple[str, ...], name: str) -> str:
    """
    :param value: What the user chose
    :param choices: What there is
    :param name: What the choice is called in the error message
    :return: The same value
    :raises ValueError: if it is not one of the choices
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def pairwise_energy(x: th.Tensor, y: th.Tensor, energy: str = "norm", first: int | None = None) -> th.Tensor:
    """
    Similarity of every row of ``x`` with every row of ``y``: the logits of the contrastive loss.

    ``"norm"`` is the negative Euclidean distance (what table 7 of the paper calls L2), with gradient zero where two
    rows are equal; ``"squared"`` its negative square; ``"dot"`` the inner product; ``"cosine"`` the inner
    product of the rows scaled to length 1.

    :param x: Representations of shape ``(n, repr_dim)``
    :param y: Representations of shape ``(m, repr_dim)``
    :param energy: One of ``ENERGIES``
    :param first: Row of ``y`` that belongs to the first row of ``x``, as its positive; 0 if both have as many rows
    :return: Energies of shape ``(n, m)``
    :raises ValueError: if there is no such energy
    """
    if first is None and len(x) == len(y):
        first = 0
    return _ENERGIES[check_choice(energy, ENERGIES, "energy")][0](x, y, first)


def rowwise_energy(x: th.Tensor, y: th.Tensor, energy: str = "norm") -> th.Tensor:
    """
    Similarity of each row of ``x`` with the same row of ``y``: the diagonal of :func:`pairwise_energy`.

    :param x: Representations of shape ``(n, repr_dim)``
    :param y: Representations of shape ``(n, repr_dim)``
    :param energy: One of ``ENERGIES``
    :return: Energies of shape ``(n,)``
    :raises ValueError: if there is no such energy
    """
    return _ENERGIES[check_choice(energy, ENERGIES, "energy")][1](x, y)


class LogitsSummary(NamedTuple):
    """
    What the contrastive losses and metrics need of the logits, whose rows are state-action pairs and whose columns are
    goals, with the positives on the diagonal.

    :param positives: Logits of the positives, shape ``(batch_size,)``
    :param row_logsumexp: Log-sum-exp over the goals, shape ``(batch_size,)``
    :param column_logsumexp: Log-sum-exp over the state-action pairs, shape ``(batch_size,)``
    :param correct: Whether the positive is the largest logit of its row, shape ``(batch_size,)``; without gradient
    :param total: Sum of all logits; without gradient
    """

    positives: th.Tensor
    row_logsumexp: th.Tensor
    column_logsumexp: th.Tensor
    correct: th.Tensor
    total: th.Tensor


def summarize_logits(logits: th.Tensor, first: int = 0) -> LogitsSummary:
    """
    :param logits: Energies of shape ``(n, batch_size)``: all rows, or some neighbouring ones
    :param first: Index of the first of these rows
    :return: Their summary
    """
    n = logits.shape[0]
    best = logits.detach().argmax(dim=1)
    return LogitsSummary(
        positives=logits.diagonal(offset=first),
        row_logsumexp=logits.logsumexp(dim=1),
        column_logsumexp=logits.logsumexp(dim=0),
        correct=best == th.arange(first, first + n, device=logits.device),
        total=logits.detach().sum(),
    )


def contrast(x: th.Tensor, y: th.Tensor, energy: str = "norm", chunk_size: int | None = None) -> LogitsSummary:
    """
    Compare every row of ``x`` with every row of ``y``.

    :param x: Representations of state-action pairs, shape ``(batch_size, repr_dim)``
    :param y: Representations of goals, shape ``(batch_size, repr_dim)``
    :param energy: One of ``ENERGIES``
    :param chunk_size: Compare so many rows of ``x`` at a time and compute them again in the backward pass, so that memory
        grows with the batch size and not with its square. None compares all at once.
    :return: The summary of the logits
    """
    batch_size = len(x)
    if chunk_size is None or chunk_size >= batch_size:
        return summarize_logits(pairwise_energy(x, y, energy))

    def compare(rows: th.Tensor, goals: th.Tensor, first: int) -> LogitsSummary:
        return summarize_logits(pairwise_energy(rows, goals, energy, first), first)

    chunks = [
        checkpoint(compare, x[first : first + chunk_size], y, first, use_reentrant=False, preserve_rng_state=False)
        for first in range(0, batch_size, chunk_size)
    ]
    return LogitsSummary(
        positives=th.cat([chunk.positives for chunk in chunks]),
        row_logsumexp=th.cat([chunk.row_logsumexp for chunk in chunks]),
        column_logsumexp=th.stack([chunk.column_logsumexp for chunk in chunks]).logsumexp(dim=0),
        correct=th.cat([chunk.correct for chunk in chunks]),
        total=th.stack([chunk.total for chunk in chunks]).sum(),
    )


def _summary(logits: LogitsSummary | th.Tensor) -> LogitsSummary:
    return logits if isinstance(logits, LogitsSummary) else summarize_logits(logits)


def info_nce(logits: LogitsSummary | th.Tensor, contrastive_loss: str = "forward") -> th.Tensor:
    """
    InfoNCE: cross-entropy of picking the positive among all candidates (equation 2 of the paper).

    ``"forward"`` (the paper) picks the goal of each state-action pair among the columns, ``"backward"`` the
    state-action pair of each goal among the rows, ``"symmetric"`` is the mean of both.

    :param logits: Energies of shape ``(batch_size, batch_size)`` with the positives on the diagonal, or the outcome
        of :func:`contrast`
    :param contrastive_loss: One of ``CONTRASTIVE_LOSSES``
    :return: The loss, a scalar
    :raises ValueError: if there is no such loss
    """
    check_choice(contrastive_loss, CONTRASTIVE_LOSSES, "contrastive_loss")
    logits = _summary(logits)
    if contrastive_loss == "symmetric":
        return (0.5 * (logits.row_logsumexp + logits.column_logsumexp) - logits.positives).mean()
    logsumexp = logits.row_logsumexp if contrastive_loss == "forward" else logits.column_logsumexp
    return (logsumexp - logits.positives).mean()


def logsumexp_penalty(logits: LogitsSummary | th.Tensor, contrastive_loss: str = "forward") -> th.Tensor:
    """
    Mean square of the log-sum-exp over the candidates. InfoNCE does not change when a constant is added to
    a row of logits; this term fixes the constant. The paper adds it with a coefficient of 0.1 (table 7).

    :param logits: Energies of shape ``(batch_size, batch_size)`` with the positives on the diagonal, or the outcome
        of :func:`contrast`
    :param contrastive_loss: Same meaning as for :func:`info_nce`
    :return: The penalty, a scalar
    :raises ValueError: if there is no such loss
    """
    check_choice(contrastive_loss, CONTRASTIVE_LOSSES, "contrastive_loss")
    logits = _summary(logits)
    if contrastive_loss == "symmetric":
        return 0.5 * (logits.row_logsumexp.square().mean() + logits.column_logsumexp.square().mean())
    return (logits.row_logsumexp if contrastive_loss == "forward" else logits.column_logsumexp).square().mean()


class ContrastiveMetrics(NamedTuple):
    """
    Scalars that tell how well the critic tells the positives apart, logged as ``train/`` with these names.

    :param categorical_accuracy: Fraction of the rows whose largest logit is the positive. Chance is one in ``batch_size``; a
        trained critic has 30 to 150 times as much. It need not come near 1: states that follow each other lead to like goals.
    :param logits_pos: Mean logit of the positives; with ``energy="norm"`` and ``"squared"`` never above 0
    :param logits_neg: Mean logit of the negatives. Equal to ``logits_pos`` at the start, below it as soon as the critic learns
    :param logsumexp: Mean log-sum-exp of a row, which the log-sum-exp penalty keeps near 0
    """

    categorical_accuracy: th.Tensor
    logits_pos: th.Tensor
    logits_neg: th.Tensor
    logsumexp: th.Tensor


def contrastive_metrics(logits: LogitsSummary | th.Tensor) -> ContrastiveMetrics:
    """
    :param logits: Energies of shape ``(batch_size, batch_size)`` with the positives on the diagonal, or the outcome
        of :func:`contrast`
    :return: Fraction of rows whose largest logit is the positive, mean logit of the positives,
        mean logit of the negatives and mean log-sum-exp over a row. No gradient flows through them.
    """
    logits = _summary(logits)
    positives = logits.positives.detach()
    batch_size = len(positives)
    return ContrastiveMetrics(
        categorical_accuracy=logits.correct.to(positives.dtype).mean(),
        logits_pos=positives.mean(),
        logits_neg=(logits.total - positives.sum()) / (batch_size * (batch_size - 1)),
        logsumexp=logits.row_logsumexp.detach().mean(),
    )


def squashed_gaussian(mean: th.Tensor, log_std: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Reparametrised sample of a diagonal Gaussian squashed by tanh, with its log-probability
    (appendix C of the SAC paper, https://arxiv.org/abs/1801.01290).

    The correction ``log(1 - tanh(u)^2)`` is computed as ``2 (log 2 - u - softplus(-2 u))``, which is exact where the
    usual form saturates.

    :param mean: Mean before squashing, shape ``(batch_size, action_dim)``
    :param log_std: Log of the standard deviation before squashing, same shape
    :param noise: Standard normal noise, same shape
    :return: Actions in [-1, 1], shape ``(batch_size, action_dim)``, and their log-probability, shape ``(batch_size,)``
    """
    gaussian_action = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2.0 * (math.log(2.0) - gaussian_action - F.softplus(-2.0 * gaussian_action))
    return th.tanh(gaussian_action), log_prob.sum(dim=1)
