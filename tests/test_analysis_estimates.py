import numpy as np
import pytest
from rliable.metrics import aggregate_iqm

from sb3_deepcrl.analysis.statistics import Estimate, interquartile_mean


@pytest.mark.parametrize("n_seeds", [1, 2, 3, 4, 5, 9])
def test_interquartile_mean_is_that_of_rliable(n_seeds):
    curves = np.random.default_rng(n_seeds).exponential(size=(n_seeds, 3))
    means = [estimate.mean for estimate in interquartile_mean(curves, n_resamples=10)]
    np.testing.assert_allclose(means, [aggregate_iqm(curves[:, [point]]) for point in range(3)])


def test_interval_of_a_constant_is_a_point():
    assert interquartile_mean(np.full((3, 1), 7.0), n_resamples=10) == [Estimate(7.0, 7.0, 7.0)]


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
