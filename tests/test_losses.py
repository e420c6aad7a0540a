import math

import pytest
import torch as th

from sb3_deepcrl.common.losses import (
    CONTRASTIVE_LOSSES,
    ENERGIES,
    contrastive_metrics,
    info_nce,
    logsumexp_penalty,
    pairwise_energy,
    rowwise_energy,
    squashed_gaussian,
)


@pytest.mark.parametrize(
    ("energy", "expected"),
    [
        ("norm", [[-5.0, -1.0], [-math.sqrt(20.0), 0.0]]),
        ("squared", [[-25.0, -1.0], [-20.0, 0.0]]),
        ("dot", [[0.0, 0.0], [4.0, 1.0]]),
        ("cosine", [[0.0, 0.0], [4 / 5, 1.0]]),
    ],
)
def test_energies_by_hand(energy, expected):
    x = th.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=th.float64)
    y = th.tensor([[4.0, 3.0], [1.0, 0.0]], dtype=th.float64)
    if energy == "norm":
        expected[1][0] = -math.sqrt(18.0)
    if energy == "squared":
        expected[1][0] = -18.0
    th.testing.assert_close(pairwise_energy(x, y, energy), th.tensor(expected, dtype=th.float64))
    th.testing.assert_close(rowwise_energy(x, y, energy), th.tensor(expected, dtype=th.float64).diagonal())


@pytest.mark.parametrize("energy", ENERGIES)
def test_energy_gradients(energy):
    th.manual_seed(0)
    x, y = (th.randn(4, 3, dtype=th.float64, requires_grad=True) for _ in range(2))
    assert th.autograd.gradcheck(lambda a, b: pairwise_energy(a, b, energy), (x, y))
    assert th.autograd.gradcheck(lambda a, b: rowwise_energy(a, b, energy), (x, y))


@pytest.mark.parametrize("function", [pairwise_energy, rowwise_energy])
def test_norm_of_equal_representations_has_a_finite_gradient(function):
    x = th.ones(3, 4, requires_grad=True)
    function(x, x.detach().clone()).sum().backward()
    th.testing.assert_close(x.grad, th.zeros(3, 4))


def test_distances_far_from_the_origin_stay_exact():
    th.manual_seed(0)
    x, y = th.randn(64, 64), th.randn(64, 64)
    near = pairwise_energy(x, y)
    th.testing.assert_close(pairwise_energy(x + 300.0, y + 300.0), near, atol=2e-3, rtol=1e-4)
    exact = -th.linalg.vector_norm(x.double()[:, None] - y.double()[None], dim=2)
    th.testing.assert_close(near.double(), exact, atol=1e-4, rtol=1e-5)


def test_positives_keep_their_gradient_where_they_nearly_meet():
    th.manual_seed(0)
    x = (30 * th.randn(64, 64)).requires_grad_()
    y = x.detach() + 0.01 * th.nn.functional.normalize(th.randn(64, 64), dim=1)
    pairwise_energy(x, y).diagonal().sum().backward()
    th.testing.assert_close(x.grad.norm(dim=1), th.ones(64), rtol=0.02, atol=0.0)


LOGITS = th.tensor([[0.0, math.log(3.0)], [math.log(2.0), math.log(2.0)]], dtype=th.float64)


@pytest.mark.parametrize(
    ("contrastive_loss", "expected"),
    [
        # Rows: log(1 + 3) - 0 and log(2 + 2) - log 2
        ("forward", (math.log(4.0) + math.log(2.0)) / 2),
        # Columns: log(1 + 2) - 0 and log(3 + 2) - log 2
        ("backward", (math.log(3.0) + math.log(2.5)) / 2),
        ("symmetric", (math.log(4.0) + math.log(2.0) + math.log(3.0) + math.log(2.5)) / 4),
    ],
)
def test_info_nce_by_hand(contrastive_loss, expected):
    assert info_nce(LOGITS, contrastive_loss).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("contrastive_loss", "expected"),
    [
        ("forward", math.log(4.0) ** 2),
        ("backward", (math.log(3.0) ** 2 + math.log(5.0) ** 2) / 2),
        ("symmetric", (math.log(4.0) ** 2 + (math.log(3.0) ** 2 + math.log(5.0) ** 2) / 2) / 2),
    ],
)
def test_logsumexp_penalty_by_hand(contrastive_loss, expected):
    assert logsumexp_penalty(LOGITS, contrastive_loss).item() == pytest.approx(expected)


@pytest.mark.parametrize("contrastive_loss", CONTRASTIVE_LOSSES)
def test_loss_gradients(contrastive_loss):
    th.manual_seed(0)
    logits = th.randn(5, 5, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(lambda x: info_nce(x, contrastive_loss), (logits,))
    assert th.autograd.gradcheck(lambda x: logsumexp_penalty(x, contrastive_loss), (logits,))


def test_backward_is_forward_of_the_transpose():
    th.manual_seed(0)
    logits = th.randn(6, 6)
    th.testing.assert_close(info_nce(logits, "backward"), info_nce(logits.T, "forward"))
    th.testing.assert_close(info_nce(logits), th.nn.functional.cross_entropy(logits, th.arange(6)))


def test_metrics_by_hand():
    logits = th.tensor([[2.0, 1.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    metrics = contrastive_metrics(logits)
    assert metrics.categorical_accuracy.item() == pytest.approx(2 / 3)
    assert metrics.logits_pos.item() == pytest.approx(2.0)
    assert metrics.logits_neg.item() == pytest.approx(1.0)
    expected = sum(math.log(sum(math.exp(value) for value in row)) for row in logits.tolist()) / 3
    assert metrics.logsumexp.item() == pytest.approx(expected)


def test_squashed_gaussian_matches_the_definition():
    th.manual_seed(0)
    mean, log_std, noise = (th.randn(6, 2, dtype=th.float64) for _ in range(3))
    actions, log_prob = squashed_gaussian(mean, log_std, noise)
    gaussian = th.distributions.Normal(mean, log_std.exp())
    raw = mean + log_std.exp() * noise
    expected = (gaussian.log_prob(raw) - th.log(1 - raw.tanh().square())).sum(dim=1)
    th.testing.assert_close(actions, raw.tanh())
    th.testing.assert_close(log_prob, expected)


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
        (pairwise_energy, (th.zeros(2, 2), th.zeros(2, 2), "l2"), "energy"),
        (rowwise_energy, (th.zeros(2, 2), th.zeros(2, 2), "l2"), "energy"),
        (info_nce, (LOGITS, "fwd"), "contrastive_loss"),
        (logsumexp_penalty, (LOGITS, "fwd"), "contrastive_loss"),
    ],
)
def test_unknown_choices(function, args, name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .* got '{args[-1]}'"):
        function(*args)
