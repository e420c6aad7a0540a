"""
Running normalization of the observations of a goal-conditioned env, inside a policy.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

# Beyond so many standard deviations values are clipped, those of goals excepted (as `clip_obs` of VecNormalize)
CLIP = 10.0
# What varies less is taken as constant, and only centered
MIN_STD = 1e-4

# Number of rows, their mean and their variance
Moments = tuple[th.Tensor, th.Tensor, th.Tensor]


def _combine(first: Moments, second: Moments) -> Moments:
    """Moments of two sets of rows together (parallel algorithm of Chan et al., that of SB3's ``RunningMeanStd``)."""
    (n_first, mean_first, var_first), (n_second, mean_second, var_second) = first, second
    count = n_first + n_second
    delta = mean_second - mean_first
    mean = mean_first + delta * (n_second / count)
    return count, mean, (var_first * n_first + var_second * n_second + delta.square() * (n_first * n_second / count)) / count


class RunningNorm(nn.Module):
    """
    Normalize observations by running mean and standard deviation, like ``VecNormalize``, with statistics that belong to the
    network. Images and discrete values stay as they are. Two things differ because goals are relabeled:

    - ``desired_goal`` has the statistics of ``achieved_goal``, so that a goal is the same number wherever it stands.
    - All coordinates of goals are divided by the largest of their standard deviations, and not clipped. What hardly varies
      among the states so far (a height) is not blown up where other goals are wanted, and directions to far goals are kept.

    The statistics change in place, as CUDA graphs need it, and only when :meth:`update` is called: all updates after a rollout
    see the same. They are float64, since what a rollout adds to millions of steps is below the precision of float32.

    :param observation_space: Observation space, with the keys ``achieved_goal`` and ``desired_goal``
    """

    count: th.Tensor
    mean: th.Tensor
    var: th.Tensor

    def __init__(self, observation_space: spaces.Dict):
        super().__init__()
        self.shapes = {
            key: space.shape
            for key, space in observation_space.spaces.items()
            if key != "desired_goal" and isinstance(space, spaces.Box) and not is_image_space(space, normalized_image=True)
        }
        sizes = [int(th.Size(shape).numel()) for shape in self.shapes.values()]
        ends = th.tensor(sizes).cumsum(0).tolist()
        self.columns = {key: slice(end - size, end) for key, size, end in zip(self.shapes, sizes, ends, strict=True)}
        self.register_buffer("count", th.zeros((), dtype=th.float64))
        self.register_buffer("mean", th.zeros(sum(sizes), dtype=th.float64))
        self.register_buffer("var", th.ones(sum(sizes), dtype=th.float64))
        # Of the rows that are not yet in the statistics
        self._added: Moments | None = None

    def forward(self, observations: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        """Normalize observations, arrays of shape ``(batch_size, ...)`` by key; any of the keys may be missing."""
        normalized = dict(observations)
        # Nothing to clip by before the first update
        limit = th.where(self.count > 0, CLIP, math.inf).to(th.float32)
        for key, values in observations.items():
            is_goal = key in ("achieved_goal", "desired_goal")
            source = "achieved_goal" if is_goal else key
            if source in self.columns:
                mean, var = self.mean[self.columns[source]], self.var[self.columns[source]]
                if is_goal:
                    var = var.amax(0).expand_as(var)
                scale = th.where(var > MIN_STD**2, var.rsqrt(), 1.0)
                mean, scale = (statistic.to(th.float32).reshape(self.shapes[source]) for statistic in (mean, scale))
                scaled = (values.to(th.float32) - mean) * scale
                normalized[key] = scaled if is_goal else scaled.clamp(-limit, limit)
        return normalized

    def add(self, observations: Mapping[str, Any]) -> None:
        """
        Add observations to those of which the next :meth:`update` learns.

        :param observations: Arrays or tensors of shape ``(n_envs, ...)`` by key
        """
        rows = [th.as_tensor(observations[key]).to(th.float64) for key in self.columns]
        if rows:
            var, mean = th.var_mean(th.cat([values.reshape(len(values), -1) for values in rows], dim=1), dim=0, correction=0)
            # Filled on the device, where copying a number would wait for all that was started before
            added = mean.new_full((), len(rows[0])), mean, var
            self._added = added if self._added is None else _combine(self._added, added)

    def forget_added(self) -> None:
        """Forget what was added since the last update."""
        self._added = None

    def update(self, collect: Callable[[Moments], list[Moments]] = lambda added: [added]) -> None:
        """
        Update the statistics with what was added since the last time.

        :param collect: Function that gives, from what was added here, what was added on all ranks
        """
        if self._added is not None:
            added = functools.reduce(_combine, collect(self._added))
            updated = _combine((self.count, self.mean, self.var), tuple(values.to(self.mean.device) for values in added))  # type: ignore[arg-type]
            self._added = None
            for statistics, values in zip((self.count, self.mean, self.var), updated, strict=True):
                statistics.copy_(values)


def check_normalized_once(normalize_observations: bool, env: VecNormalize | None) -> None:
    """Check that policy and env do not both normalize the observations."""
    if normalize_observations and env is not None and env.norm_obs:
        raise ValueError(
            "`normalize_observations=True` and `VecNormalize` would normalize the observations twice: do without one of them, "
            "or use `VecNormalize(env, norm_obs=False)`"
        )


def warn_of_clipped_goals(goals: th.Tensor, env: VecNormalize | None) -> bool:
    """
    Warn if the desired goal never changes: VecNormalize divides by nothing then, and clips all other goals.

    :return: Whether there was something to check
    """
    if env is None or not env.norm_obs or "desired_goal" not in (env.norm_obs_keys or ()):
        return False
    if (goals.abs() >= env.clip_obs).float().mean() > 0.5:
        warnings.warn(
            "VecNormalize clips most of the relabeled goals, because the env's own `desired_goal` varies too little: "
            "exclude it, for instance with `VecNormalize(env, norm_obs_keys=['observation'])`, or use "
            "`normalize_observations=True` of DeepCRL instead"
        )
    return True
