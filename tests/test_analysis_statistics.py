import numpy as np
import pytest
from rliable.metrics import aggregate_iqm
from scipy.stats import spearmanr

from sb3_deepcrl.analysis.statistics import (
    N_LAST,
    Estimate,
    critical_depth,
    curves_of,
    final_scores,
    interquartile_mean,
    interquartile_means,
    rank_correlation,
    steps_to_success,
)


@pytest.mark.parametrize("n_seeds", [2, 3, 4, 8, 11])
def test_interquartile_mean(n_seeds):
    curves = np.random.default_rng(0).normal(5.0, 2.0, (n_seeds, 3))
    estimates = interquartile_means(curves)
    assert [estimate.mean for estimate in estimates] == pytest.approx([aggregate_iqm(column) for column in curves.T])
    for estimate, column in zip(estimates, curves.T, strict=True):
        assert column.min() <= estimate.low <= estimate.mean <= estimate.high <= column.max()
        assert estimate.low < estimate.high


def test_interquartile_mean_by_hand():
    scores = np.array([0.0, 1.0, 3.0, 100.0])
    assert interquartile_mean(scores).mean == 2.0
    # Without quarters to cut off it is the mean
    assert interquartile_mean(scores[:3]).mean == pytest.approx(4 / 3)
    assert interquartile_mean(np.full(5, 7.0)) == (7.0, 7.0, 7.0)


def test_interquartile_mean_is_reproducible():
    scores = np.random.default_rng(0).normal(size=6)
    np.random.seed(1)
    first = interquartile_mean(scores)
    number = np.random.random()
    np.random.seed(1)
    assert np.random.random() == number, "the global generator must be left as it was"
    assert interquartile_mean(scores) == first


def test_one_seed_has_no_interval():
    estimate = interquartile_mean(np.array([3.0]))
    assert estimate.mean == 3.0
    assert np.isnan([estimate.low, estimate.high]).all()
    assert str(estimate) == "3.00"
    assert str(Estimate(123.4, 100.2, 150.7)) == "123 (100 to 151)"
    for curves in (np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"must have the shape \(n_seeds, n_points\) with at least one of each, got"):
            interquartile_means(curves)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (Estimate(5, 4, 6), Estimate(2, 1, 3), "higher"),
        (Estimate(2, 1, 3), Estimate(5, 4, 6), "lower"),
        (Estimate(5, 3, 7), Estimate(4, 2, 6), "intervals overlap"),
        (Estimate(5, 4, 6), Estimate(7, 6, 8), "intervals overlap"),
        (Estimate(5, np.nan, np.nan), Estimate(2, 1, 3), "one seed tells nothing"),
        (Estimate(5, 4, 6), Estimate(2, np.nan, np.nan), "one seed tells nothing"),
    ],
)
def test_comparison(first, second, words):
    assert first.compare(second) == words


def test_critical_depth():
    def estimates(**intervals) -> dict[int, Estimate]:
        return {int(depth[1:]): Estimate(sum(interval) / 2, *interval) for depth, interval in intervals.items()}

    assert critical_depth(estimates(d4=(0, 1), d8=(0.5, 2), d16=(3, 4), d32=(5, 6))) == 16
    assert critical_depth(estimates(d16=(3, 4), d4=(0, 1), d8=(1.5, 2))) == 8
    assert critical_depth(estimates(d4=(0, 1), d8=(0.5, 2), d16=(1.5, 4))) is None
    assert critical_depth(estimates(d4=(3, 4), d8=(0, 1), d16=(2, 3.5))) is None
    assert critical_depth({4: Estimate(0, np.nan, np.nan), 8: Estimate(9, np.nan, np.nan)}) is None
    assert critical_depth(estimates(d4=(0, 1))) is None


def test_scores_of_runs():
    seeds = [{"score": np.arange(10.0)}, {"score": np.arange(100.0, 108.0)}]
    assert final_scores(seeds, "score").tolist() == [7.0, 105.0]
    assert N_LAST == 5
    assert curves_of(seeds, "score").tolist() == [list(range(8)), list(range(100, 108))]


@pytest.mark.parametrize(
    ("success", "steps"),
    [([0.5, 0.9, 0.8, 0.9, 1.0], 40), ([0.9, 0.95, 0.0], 10), ([0.0, 0.9, 0.8, 0.9], np.inf), ([1.0], np.inf)],
)
def test_steps_to_success(success, steps):
    run = {"success_any": np.array(success), "timesteps": 10 * np.arange(1, len(success) + 1)}
    assert steps_to_success(run) == steps


def test_rank_correlation():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 10, 50), rng.integers(0, 10, 50)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation(first, np.exp(first)) == pytest.approx(1)
    assert np.isnan(rank_correlation(first, np.ones(50)))
