import math

import pytest
import torch as th
from torch.nn import functional as F

from sb3_deepcrl.common.distributions import squashed_gaussian
from sb3_deepcrl.common.losses import CONTRASTIVE_LOSSES, ENERGIES, info_nce, rowwise_energy
from sb3_deepcrl.common.tower_kernel import load_kernel

FUSED = [False, pytest.param(True, marks=pytest.mark.skipif(load_kernel() is None, reason="no AVX2 or no compiler"))]


def pairwise_energy(x, y, energy="norm"):
    """Of all pairs of rows, by definition."""
    return th.stack([rowwise_energy(x, goal.expand_as(x), energy) for goal in y], dim=1)


def reference(x, y, energy="norm", contrastive_loss="forward", logsumexp_coef=0.1):
    """Loss, its gradients and the metrics, by the textbook and autograd in float64."""
    x, y = (value.detach().double().requires_grad_() for value in (x, y))
    logits = pairwise_energy(x, y, energy)
    losses = []
    for matrix in {"forward": [logits], "backward": [logits.T], "symmetric": [logits, logits.T]}[contrastive_loss]:
        penalty = matrix.logsumexp(dim=1).square().mean()
        losses.append(F.cross_entropy(matrix, th.arange(len(x))) + logsumexp_coef * penalty)
    loss = sum(losses) / len(losses)
    others = logits[~th.eye(len(x), dtype=th.bool)]
    accuracy = (logits.argmax(dim=1) == th.arange(len(x))).double().mean()
    metrics = [accuracy, logits.diagonal().mean(), others.mean(), logits.logsumexp(dim=1).mean()]
    return [loss.detach(), *th.autograd.grad(loss, (x, y)), *(metric.detach() for metric in metrics)]


def outcome(x, y, *args, **kwargs):
    x, y = (value.detach().requires_grad_() for value in (x, y))
    loss, metrics = info_nce(x, y, *args, **kwargs)
    # The loss is one of several
    return [loss.detach(), *th.autograd.grad(loss + 0.0 * loss.square(), (x, y)), *metrics]


@pytest.mark.parametrize(
    ("energy", "expected"),
    [("norm", [-5.0, -2.0]), ("squared", [-25.0, -4.0]), ("dot", [0.0, 3.0]), ("cosine", [0.0, 1.0])],
)
def test_energies_by_hand(energy, expected):
    x = th.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=th.float64)
    y = th.tensor([[4.0, 3.0], [3.0, 0.0]], dtype=th.float64)
    th.testing.assert_close(rowwise_energy(x, y, energy), th.tensor(expected, dtype=th.float64))


@pytest.mark.parametrize("energy", ENERGIES)
def test_energy_gradients(energy):
    th.manual_seed(0)
    x, y = (th.randn(4, 3, dtype=th.float64, requires_grad=True) for _ in range(2))
    assert th.autograd.gradcheck(lambda a, b: rowwise_energy(a, b, energy), (x, y))


@pytest.mark.parametrize("fused", FUSED)
def test_norm_of_equal_representations_has_a_finite_gradient(fused):
    x = th.ones(3, 4, requires_grad=True)
    rowwise_energy(x, x.detach().clone()).sum().backward()
    th.testing.assert_close(x.grad, th.zeros(3, 4))
    assert all(th.isfinite(value).all() for value in outcome(x, x.detach().clone(), fused=fused))


@pytest.mark.parametrize("contrastive_loss", CONTRASTIVE_LOSSES)
@pytest.mark.parametrize("energy", ENERGIES)
def test_info_nce(energy, contrastive_loss):
    th.manual_seed(0)
    x, y = (th.randn(12, 4, dtype=th.float64) for _ in range(2))
    actual = outcome(x, y, energy, contrastive_loss, 0.1)
    for one, wanted in zip(actual, reference(x, y, energy, contrastive_loss), strict=True):
        th.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("distance", [1e-3, 0.5, 5.0])
@pytest.mark.parametrize(("n", "dim"), [(2, 1), (3, 5), (31, 64), (77, 48), (512, 64), (1030, 7)])
def test_info_nce_in_float32(n, dim, distance, fused):
    """Distances do not lose their digits far from the origin, nor gradients where the positives nearly meet."""
    th.manual_seed(0)
    y = th.randn(n, dim) + 100.0
    x = y + distance * F.normalize(th.randn(n, dim), dim=1)
    for one, wanted in zip(outcome(x, y, logsumexp_coef=0.1, fused=fused), reference(x, y), strict=True):
        assert (one - wanted).norm() <= 1e-4 * wanted.norm().clamp(min=0.1)


@pytest.mark.parametrize("fused", FUSED)
def test_extreme_representations(fused):
    """Rows so far from all others that nothing but the nearest counts, and rows that are no numbers."""
    th.manual_seed(0)
    x, y = 1e6 * th.randn(40, 8), 1e6 * th.randn(40, 8)
    for one, wanted in zip(outcome(x, y, fused=fused), reference(x, y, logsumexp_coef=0.0), strict=True):
        assert (one - wanted).norm() <= 1e-4 * wanted.norm()
    x[3, 2] = th.nan
    assert outcome(x, y, fused=fused)[0].isnan()


@pytest.mark.parametrize("fused", FUSED)
def test_gradient_of_one_side_only(fused):
    th.manual_seed(0)
    x, y = th.randn(20, 4), th.randn(20, 4)
    only = y.clone().requires_grad_()
    loss, metrics = info_nce(x, only, logsumexp_coef=0.1, fused=fused)
    (2.0 * loss).backward()
    wanted = reference(x, y)
    th.testing.assert_close(only.grad.double(), 2.0 * wanted[2], rtol=1e-4, atol=1e-6)
    assert not any(metric.requires_grad for metric in metrics)
    with th.no_grad():
        th.testing.assert_close(info_nce(x, y, logsumexp_coef=0.1, fused=fused)[0], loss.detach())


@pytest.mark.parametrize("fused", FUSED)
def test_numbers_of_another_type(fused):
    th.manual_seed(0)
    x, y = (th.randn(20, 4, dtype=th.float64) for _ in range(2))
    for one, wanted in zip(outcome(x, y, logsumexp_coef=0.1, fused=fused), reference(x, y), strict=True):
        th.testing.assert_close(one, wanted)


def test_squashed_gaussian_matches_the_definition():
    th.manual_seed(0)
    mean, log_std, noise = (th.randn(6, 2, dtype=th.float64) for _ in range(3))
    actions, log_prob = squashed_gaussian(mean, log_std, noise)
    gaussian = th.distributions.Normal(mean, log_std.exp())
    raw = mean + log_std.exp() * noise
    expected = (gaussian.log_prob(raw) - th.log(1 - raw.tanh().square())).sum(dim=1)
    th.testing.assert_close(actions, raw.tanh())
    th.testing.assert_close(log_prob, expected)


def test_squashed_gaussian_gradients():
    th.manual_seed(0)
    mean, log_std = (th.randn(3, 2, dtype=th.float64, requires_grad=True) for _ in range(2))
    noise = th.randn(3, 2, dtype=th.float64)
    assert th.autograd.gradcheck(lambda *args: squashed_gaussian(*args, noise), (mean, log_std))
    assert th.autograd.gradgradcheck(lambda *args: squashed_gaussian(*args, noise), (mean, log_std))
    by_row = th.func.vmap(th.func.grad(lambda *args: squashed_gaussian(*(x[None] for x in args))[1].sum()))
    expected = th.autograd.grad(squashed_gaussian(mean, log_std, noise)[1].sum(), mean)[0]
    th.testing.assert_close(by_row(mean.detach(), log_std.detach(), noise), expected)


@pytest.mark.skipif(load_kernel() is None, reason="no AVX2 or no compiler")
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (33, 17)])
def test_fused_squashed_gaussian(shape):
    th.manual_seed(0)
    mean, log_std, noise = 3 * th.randn(shape), th.randn(shape), th.randn(shape)
    mean[0] = th.tensor([40.0, -40.0, 0.0])[: shape[1]].repeat(shape[1])[: shape[1]]
    inputs = [value.double().requires_grad_() for value in (mean, log_std)]
    expected = squashed_gaussian(*inputs, noise.double())
    fused = [value.requires_grad_() for value in (mean, log_std)]
    outputs = squashed_gaussian(*fused, noise, fused=True)
    for output, wanted in zip(outputs, expected, strict=True):
        th.testing.assert_close(output, wanted.float(), rtol=1e-6, atol=1e-5)
    for values in (outputs, expected):
        (values[0].sum() + values[1].square().sum()).backward()
    for ours, wanted in zip(fused, inputs, strict=True):
        th.testing.assert_close(ours.grad, wanted.grad.float(), rtol=1e-5, atol=1e-4)
    actions, log_prob = squashed_gaussian(th.full(shape, th.nan), log_std, noise, fused=True)
    assert actions.isnan().all() and log_prob.isnan().all()


def test_squashed_gaussian_by_hand():
    # At zero: density of the normal law, and the derivative of tanh is one
    zero = th.zeros(1, 1, dtype=th.float64)
    _, log_prob = squashed_gaussian(zero, zero, zero)
    assert log_prob.item() == pytest.approx(-0.5 * math.log(2 * math.pi))


def test_squashed_gaussian_is_finite_where_tanh_saturates():
    mean = th.tensor([[-40.0, 40.0]], requires_grad=True)
    _, log_prob = squashed_gaussian(mean, th.zeros(1, 2), th.zeros(1, 2))
    log_prob.sum().backward()
    assert th.isfinite(log_prob).all()
    assert th.isfinite(mean.grad).all()


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (rowwise_energy, ("l2",), "energy"),
        (info_nce, ("l2",), "energy"),
        (info_nce, ("norm", "fwd"), "contrastive_loss"),
    ],
)
def test_unknown_choices(function, args, name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .* got '{args[-1]}'"):
        function(th.zeros(2, 2), th.zeros(2, 2), *args)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_representations_that_are_all_the_same_are_wrong(value, fused):
    x = th.full((33, 4), value)
    assert info_nce(x, x.clone(), fused=fused)[1].categorical_accuracy == 0.0
    # A tie with one of the others
    x[:, 0] = th.arange(33).div(2, rounding_mode="floor")
    assert info_nce(x, x.clone(), fused=fused)[1].categorical_accuracy == pytest.approx(1 / 33)
    # Those of the same goal, whatever the states: no rounding chooses one of them
    x, y = th.randn(130, 24, generator=th.Generator().manual_seed(0)), th.full((130, 24), value)
    assert info_nce(x, y, fused=fused)[1].categorical_accuracy == 0.0
    y[:65] = x[:65]
    assert info_nce(x, y, fused=fused)[1].categorical_accuracy == 0.5
