"""
Depth against width and batch size.
"""

import inspect
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch as th
from gymnasium import spaces
from matplotlib.figure import Figure
from torch import nn

from sb3_deepcrl.analysis.episodes import make_env
from sb3_deepcrl.analysis.report import MEASURES, Results, depth_colors, draw_estimates, new_figure
from sb3_deepcrl.analysis.runs import Run, config_entry
from sb3_deepcrl.analysis.statistics import Estimate, final_estimate
from sb3_deepcrl.analysis.study import Study
from sb3_deepcrl.common.utils import check_depth
from sb3_deepcrl.deepcrl import DeepCRL
from sb3_deepcrl.deepcrl.policies import CategoricalActor, DeepCRLPolicy
from sb3_deepcrl.env_ids import find_spec
from sb3_deepcrl.envs.arguments import default_arguments


class _PolicyWithoutNumbers(DeepCRLPolicy):
    """The policy of DeepCRL with all of its layers, which hold no numbers and take no memory."""

    @property
    def device(self) -> th.device:
        return th.device("meta")


def _make_policy(observation_space: spaces.Dict, action_space: spaces.Space, policy_kwargs: dict[str, Any]) -> DeepCRLPolicy:
    """A policy to count what is in it."""
    # Adam asks for the device of the parameters
    policy_kwargs = {**policy_kwargs, "optimizer_class": th.optim.SGD, "optimizer_kwargs": {}}
    with th.device("meta"):
        return _PolicyWithoutNumbers(observation_space, action_space, lambda _: 0.0, **policy_kwargs)


def count_operations(policy: DeepCRLPolicy, batch_size: int) -> int:
    """
    Operations of the matrix products in an update, two for each row, input and output of a layer, in the forward pass, for
    the gradients of its inputs and for those of its weights. These are three passes for the actor and for each encoder in
    the loss of the critic, and two for the encoder of state and action in the loss of the actor: with depth ``D`` and width
    ``W`` about ``11 * 2 * D * W^2 * batch_size`` operations. First layers have no gradients of their inputs but for that of
    the actions. Then there are the products of all representations with each other. With discrete actions, the loss of the
    actor takes one forward pass for each of them. Features extractors are not counted, nor is what is computed a second time
    to save memory.
    """
    actor, critic = policy.actor, policy.critic
    passes: list[tuple[nn.Module, int]] = [
        *((module, 3) for module in (actor.tower, *actor.heads, critic.g_encoder)),
        (critic.sa_encoder, 3 + (len(actor.actions) if isinstance(actor, CategoricalActor) else 2)),
        *((tower.stem, -1) for tower in (actor.tower, critic.sa_encoder, critic.g_encoder)),
    ]
    products = sum(
        n_passes * layer.in_features * layer.out_features
        for network, n_passes in passes
        for layer in network.modules()
        if isinstance(layer, nn.Linear)
    )
    return 2 * batch_size * products + 3 * 2 * batch_size**2 * critic.repr_dim


def _nearest(count: Callable[[int], int], target: int) -> int:
    """The whole number from 1 on for which a growing function is as near to the target as possible."""
    high = 1
    while count(high) < target:
        high *= 2
    high = bisect_left(range(high), target, lo=high // 2 + 1, key=count)
    return high - 1 if high > 1 and target - count(high - 1) <= count(high) - target else high


@dataclass(frozen=True)
class Size:
    """How large the networks and the minibatches are."""

    depth: int
    width: int
    batch_size: int

    def __str__(self) -> str:
        return f"depth {self.depth}, width {self.width}, batch {self.batch_size}"


@dataclass(kw_only=True)
class ScaleStudy(Study):
    """
    Depth against width and batch size (figures 4 and 7).

    Deeper networks beside a shallow one that is
    widened until it has as many parameters, or an update takes as many operations, or that takes a larger batch with as many
    operations an update. And several batch sizes at each depth. Parameters are those of the actor and both encoders,
    operations those of the matrix products in an update.
    """

    name: ClassVar[str] = "scale"

    depth: int = 4
    """Depth of the shallow network"""
    width: int | None = None
    """Width of the shallow network and of the deeper ones, by default that of the env in zoo_configs"""
    batch_size: int | None = None
    """Size of the minibatches, by default that of the env in zoo_configs"""
    depths: tuple[int, ...] = (16,)
    """Depths of the deeper networks"""
    match: tuple[Literal["parameters", "operations", "batch"], ...] = ("parameters", "operations", "batch")
    """What the shallow network gets as much of as a deeper one: parameters or operations an update by its width, or operations
    an update by a larger batch"""
    batch_sizes: tuple[int, ...] = (256, 1024)
    """Sizes of the minibatches to compare at each depth"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for depth in (self.depth, *self.depths):
            check_depth(depth)
        if min(self.depths) <= self.depth:
            raise ValueError(
                f"`depths` must be larger than `depth`, got {self.depths} and {self.depth}: leave out {min(self.depths)}"
            )

    @cached_property
    def _defaults(self) -> dict[str, int]:
        defaults = {**default_arguments(DeepCRL), **default_arguments(DeepCRLPolicy)}
        values = {**defaults, **config_entry("deepcrl", find_spec(self.env).id)}
        return {name: values[name] for name in ("width", "batch_size")}

    def _run_of(self, size: Size) -> Run:
        # The same as in other studies where it is the same
        return self.make_run(**{name: n for name, n in asdict(size).items() if self._defaults.get(name) != n})

    @cached_property
    def _spaces(self) -> tuple[Any, Any]:
        env = make_env(self.env, self.env_kwargs)
        env.close()
        return env.observation_space, env.action_space

    def count(self, size: Size, what: str) -> int:
        """Count what a network has: "parameters", or anything else for the operations of an update."""
        hyperparams = {**self._run_of(size).hyperparams, **asdict(size)}
        names = inspect.signature(DeepCRLPolicy).parameters
        policy_kwargs = {name: value for name, value in hyperparams.items() if name in names}
        policy = _make_policy(*self._spaces, {**policy_kwargs, **hyperparams.get("policy_kwargs", {})})
        if what == "parameters":
            return sum(parameter.numel() for parameter in policy.parameters())
        return count_operations(policy, size.batch_size)

    @property
    def shallow(self) -> Size:
        """The shallow network, with which all others are compared."""
        return Size(self.depth, self.width or self._defaults["width"], self.batch_size or self._defaults["batch_size"])

    def _match_of(self, depth: int, match: str) -> Size:
        def shallow(value: int) -> Size:
            return replace(self.shallow, **{"batch_size" if match == "batch" else "width": value})

        target = self.count(replace(self.shallow, depth=depth), match)
        return shallow(_nearest(lambda value: self.count(shallow(value), match), target))

    @cached_property
    def matches(self) -> dict[tuple[int, str], Size]:
        """The shallow network that is the match of a deeper one, by the depth of that and what there is as much of."""
        return {(depth, match): self._match_of(depth, match) for depth in self.depths for match in self.match}

    @cached_property
    def sizes(self) -> dict[Size, list[str]]:
        """What is trained, and what each stands for."""
        sizes: dict[Size, list[str]] = {self.shallow: ["shallow"]}
        names = {"parameters": "wider, parameters", "operations": "wider, operations", "batch": "larger batch, operations"}
        for depth in self.depths:
            sizes.setdefault(replace(self.shallow, depth=depth), []).append("deeper")
            for match in self.match:
                sizes.setdefault(self.matches[depth, match], []).append(f"{names[match]} of depth {depth}")
        for depth in (self.depth, *self.depths):
            for batch_size in self.batch_sizes:
                sizes.setdefault(Size(depth, self.shallow.width, batch_size), ["other batch"])
        return sizes

    def settings(self) -> dict[str, Run]:
        return {str(size): self._run_of(size) for size in self.sizes}

    def columns(self) -> dict[str, dict[str, Any]]:
        def describe(size: Size) -> dict[str, Any]:
            return {**asdict(size), **{what: self.count(size, what) for what in ("parameters", "operations")}}

        return {str(size): {"role": "; ".join(names), **describe(size)} for size, names in self.sizes.items()}

    def compare(self, estimates: dict[str, Estimate]) -> list[str]:
        pairs = []
        for (depth, match), size in self.matches.items():
            what = "parameters" if match == "parameters" else "operations an update"
            pairs.append((replace(self.shallow, depth=depth), size, f", which has as many {what}"))
        for depth in (self.depth, *self.depths) if len(self.batch_sizes) > 1 else ():
            least, most = (Size(depth, self.shallow.width, edge(self.batch_sizes)) for edge in (min, max))
            pairs.append((most, least, ""))
        return [
            f"Time at goal of {size} against {other}{why}: {estimates[str(size)].compare(estimates[str(other)])}."
            for size, other, why in pairs
        ]

    def draw(self, results: Results) -> Figure:
        estimates = {size: final_estimate(results[str(size)]) for size in self.sizes}
        figure, axes = new_figure(1, 3, width=4.4)
        # What differs from the shallow network
        lines = {"deeper": "depth", "wider": "width", "other batch": "batch_size"}
        for ax, (what, unit) in zip(axes[0], {"parameters": 1e6, "operations": 1e9}.items(), strict=False):
            for label, name in lines.items():
                # Another batch has as many parameters
                if (what, label) != ("parameters", "other batch"):
                    line = [size for size in estimates if replace(size, **{name: getattr(self.shallow, name)}) == self.shallow]
                    draw_estimates(ax, {self.count(size, what) / unit: estimates[size] for size in line}, label)
            ax.set(xlabel={"parameters": "million parameters", "operations": "10^9 operations an update"}[what])
        ax = axes[0, 2]
        for depth, color in depth_colors([self.depth, *self.depths]).items():
            line = [size for size in estimates if (size.depth, size.width) == (depth, self.shallow.width)]
            draw_estimates(ax, {size.batch_size: estimates[size] for size in line}, f"depth {depth}", color)
        ax.set(xlabel="batch size")
        for ax in axes[0]:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:.4g}")
            ax.set(ylim=(0, None), ylabel=MEASURES["time_at_goal"])
            ax.legend()
        return figure
