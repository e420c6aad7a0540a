"""
Interquartile means with bootstrap intervals, by rliable (Agarwal et al., 2021, https://arxiv.org/abs/2108.13264).
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# As in the paper, a number for a run is the mean over its last five evaluations (section 4.1)
N_LAST = 5


class Estimate(NamedTuple):
    """A mean over seeds and its interval. With one seed there is none: ``low`` and ``high`` are not a number."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if abs(self.mean) < 10 else 0
        if np.isnan(self.low):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"

    def is_above(self, other: "Estimate") -> bool:
        """Whether the whole interval lies above that of another estimate."""
        return self.low > other.high

    def compare(self, other: "Estimate") -> str:
        """Say in words whether the interval lies above or below that of another estimate."""
        if np.isnan([self.low, other.low]).any():
            return "one seed tells nothing"
        return "higher" if self.is_above(other) else "lower" if other.is_above(self) else "intervals overlap"


def interquartile_mean(scores: np.ndarray) -> Estimate:
    """The interquartile mean of a score of each seed, shape ``(n_seeds,)``, see :func:`interquartile_means`."""
    return interquartile_means(np.asarray(scores)[:, None])[0]


def interquartile_means(curves: np.ndarray) -> list[Estimate]:
    """
    Interquartile mean over the seeds at each point of curves of shape ``(n_seeds, n_points)``, with percentile bootstrap
    intervals of 95 % over the seeds. With less than four seeds the interquartile mean is the mean.
    """
    from rliable.library import get_interval_estimates

    curves = np.asarray(curves, dtype=np.float64)
    if curves.ndim != 2 or not curves.size:
        raise ValueError(f"Scores must have the shape (n_seeds, n_points) with at least one of each, got {curves.shape}")

    if len(curves) == 1:
        return [Estimate(float(value), np.nan, np.nan) for value in curves[0]]

    cut = len(curves) // 4

    def aggregate(scores: np.ndarray) -> np.ndarray:
        # rliable's interquartile mean of all points at once, without the checks of SciPy, which take nearly all of its time
        return np.sort(scores[:, 0], axis=0)[cut : len(scores) - cut].mean(axis=0)

    # rliable draws from NumPy's global generator, whatever its `random_state`
    state = np.random.get_state()
    np.random.seed(0)
    try:
        # Its scores have the shape (n_runs, n_tasks, n_points)
        means, intervals = get_interval_estimates({"": curves[:, None, :]}, aggregate, reps=2000)
    finally:
        np.random.set_state(state)
    return [Estimate(*map(float, values)) for values in zip(means[""], *intervals[""], strict=True)]


def curves_of(seeds: Sequence[Mapping[str, np.ndarray]], measure: str) -> np.ndarray:
    """A measure of all seeds, ``(n_seeds, n_evaluations)``; seeds with more evaluations than others are cut."""
    n = min(len(seed[measure]) for seed in seeds)
    return np.stack([seed[measure][:n] for seed in seeds])


def final_scores(seeds: Sequence[Mapping[str, np.ndarray]], measure: str) -> np.ndarray:
    """Mean of a measure over the last five evaluations of each seed."""
    return np.array([seed[measure][-N_LAST:].mean() for seed in seeds])


def final_estimate(seeds: Sequence[Mapping[str, np.ndarray]], measure: str = "time_at_goal") -> Estimate:
    """Interquartile mean over the seeds of their last five evaluations."""
    return interquartile_mean(final_scores(seeds, measure))


def steps_to_success(seed: Mapping[str, np.ndarray]) -> float:
    """Env steps at the first of two evaluations in a row with a success of 90 %, infinity if there are none."""
    good = seed["success_any"] >= 0.9
    both = np.flatnonzero(good[:-1] & good[1:])
    return float(seed["timesteps"][both[0]]) if len(both) else np.inf


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, not a number if one side is the same everywhere."""
    from scipy.stats import spearmanr

    with warnings.catch_warnings():
        # Of numbers that are all the same
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(spearmanr(np.ravel(first), np.ravel(second)).statistic)


def critical_depth(scores: Mapping[int, Estimate]) -> int | None:
    """The smallest depth whose interval lies above those of all smaller ones (section 4.3 of the paper), if there is one."""
    depths = sorted(scores)
    jumps = (depth for depth in depths[1:] if all(scores[depth].is_above(scores[d]) for d in depths if d < depth))
    return next(jumps, None)
