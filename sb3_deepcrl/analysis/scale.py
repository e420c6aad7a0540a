from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch as th
from gymnasium import spaces
from torch import nn

from sb3_deepcrl.analysis.runs import Run, make_env, with_modules
from sb3_deepcrl.analysis.statistics import Estimate
from sb3_deepcrl.analysis.study import (
    Report,
    Results,
    Study,
    depth_colors,
    draw_estimates,
    final_estimate,
    new_figure,
    option,
    rows_of,
    summarize,
)
from sb3_deepcrl.common.utils import check_choice, check_depth
from sb3_deepcrl.deepcrl.deepcrl import ARCHITECTURE
from sb3_deepcrl.deepcrl.policies import DeepCRLPolicy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What the shallow network gets as much of as the deeper one
MATCHES = ("parameters", "operations", "batch")


class PolicyWithoutNumbers(DeepCRLPolicy):
    """
    The policy of DeepCRL with all of its layers, which hold no numbers and take no memory.
    """

    @property
    def device(self) -> th.device:
        return th.device("meta")


def policy_of(observation_space: spaces.Dict, action_space: spaces.Box, hyperparams: Mapping[str, Any]) -> DeepCRLPolicy:
    """
    :param observation_space: Observation space
    :param action_space: Action space
    :param hyperparams: Arguments of DeepCRL
    :return: Its policy, to count what is in it
    """
    policy_kwargs = {name: value for name, value in hyperparams.items() if name in ARCHITECTURE}
    policy_kwargs.update(with_modules(hyperparams).get("policy_kwargs", {}))
    # Adam asks for the device of the parameters
    policy_kwargs.update(optimizer_class=th.optim.SGD, optimizer_kwargs={})
    with th.device("meta"):
        return PolicyWithoutNumbers(observation_space, action_space, lambda _: 0.0, **policy_kwargs)


def count_parameters(policy: DeepCRLPolicy) -> int:
    """
    :param policy: A policy
    :return: Number of parameters of the actor and both encoders
    """
    return sum(parameter.numel() for parameter in policy.parameters())


def count_operations(policy: DeepCRLPolicy, batch_size: int) -> int:
    """
    Operations of the matrix products in an update: two, a multiplication and an addition, for each row, input and output of
    a layer, in the forward pass, for the gradients of its inputs and for those of its weights. This is three passes for the
    actor, for each encoder in the loss of the critic, and two for the encoder of state and action in the loss of the actor,
    which asks for no gradients of its weights: 11 passes through a hidden layer of width ``W``, with depth ``D`` about
    ``11 * 2 * D * W^2 * batch_size`` operations. First layers have no gradients of their inputs but for that of the actions.
    Then there are the products of all representations with each other.

    What is computed a second time to save memory is not counted, nor are layers of features extractors.

    :param policy: A policy
    :param batch_size: Size of the minibatches
    :return: Number of operations
    """
    actor, critic = policy.actor, policy.critic
    passes: list[tuple[nn.Module, int]] = [
        (actor.tower, 3),
        (actor.mu, 3),
        (actor.log_std, 3),
        (critic.sa_encoder, 5),
        (critic.g_encoder, 3),
        (actor.tower.stem, -1),
        (critic.sa_encoder.stem, -1),
        (critic.g_encoder.stem, -1),
    ]
    products = sum(
        n_passes * layer.in_features * layer.out_features
        for network, n_passes in passes
        for layer in network.modules()
        if isinstance(layer, nn.Linear)
    )
    return 2 * batch_size * products + 3 * 2 * batch_size**2 * critic.repr_dim


def nearest(count: Callable[[int], int], target: int) -> int:
    """
    :param count: A function that grows with its argument
    :param target: What it should be
    :return: The whole number, 1 or larger, for which it is as near to that as possible
    """
    high = 1
    while count(high) < target:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if count(middle) < target:
            low = middle
        else:
            high = middle
    return low if low and target - count(low) <= count(high) - target else high


@dataclass(frozen=True)
class Size:
    """
    How large the networks and the minibatches are.

    :param depth: Depth
    :param width: Width
    :param batch_size: Size of the minibatches
    """

    depth: int
    width: int
    batch_size: int

    def __str__(self) -> str:
        return f"depth {self.depth}, width {self.width}, batch {self.batch_size}"


@dataclass
class ScaleStudy(Study):
    """
    Depth against width and against batch size (figures 4 and 7 of the paper): deeper networks beside a shallow one that is
    widened until it has as many parameters, or an update takes as many operations, or that takes a larger batch with as many
    operations an update. And several batch sizes at each depth.
    """

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "depth against width and batch size, with as many parameters or operations"

    depth: int = option(4, "Depth of the shallow network")
    depths: list[int] = option([16], "Depths of the deeper networks")
    match: list[str] = option(
        list(MATCHES),
        "What the shallow network gets as much of as a deeper one: parameters or operations an update by its width, or "
        "operations an update by a larger batch",
        choices=MATCHES,
    )
    batch_sizes: list[int] = option([256, 1024], "Sizes of the minibatches to compare at each depth")

    def __post_init__(self) -> None:
        super().__post_init__()
        for depth in (self.depth, *self.depths):
            check_depth(depth)
        if min(self.depths) <= self.depth:
            raise ValueError(
                f"`depths` must be larger than `depth`, got {self.depths} and {self.depth}: leave out {min(self.depths)}"
            )
        for match in self.match:
            check_choice(match, MATCHES, "match")
        if min(self.batch_size, *self.batch_sizes) < 2:
            raise ValueError(
                f"`batch_size` and `batch_sizes` must be at least 2, got {self.batch_size} and {self.batch_sizes}: the other "
                "rows of a minibatch are the negatives"
            )
        self.check_free(dict.fromkeys(("depth", "actor_depth", "critic_depth"), "depths"))

    @cached_property
    def _spaces(self) -> tuple[Any, Any]:
        env = make_env(self.env, 1, 0, self.env_kwargs)
        env.close()
        return env.observation_space, env.action_space

    def _run_of(self, size: Size) -> Run:
        return self.make_run(**asdict(size))

    def _policy_of(self, size: Size) -> DeepCRLPolicy:
        return policy_of(*self._spaces, self._run_of(size).hyperparams)

    def parameters(self, size: Size) -> int:
        """
        :param size: Size of networks and minibatches
        :return: Number of parameters of the actor and both encoders
        """
        return count_parameters(self._policy_of(size))

    def operations(self, size: Size) -> int:
        """
        :param size: Size of networks and minibatches
        :return: Operations of an update, see :func:`count_operations`
        """
        return count_operations(self._policy_of(size), size.batch_size)

    @property
    def shallow(self) -> Size:
        """
        :return: The shallow network, with which all others are compared
        """
        return Size(self.depth, self.width, self.batch_size)

    @cached_property
    def matches(self) -> dict[tuple[int, str], Size]:
        """
        :return: The shallow network that is the match of a deeper one, by the depth of that and one of ``MATCHES``
        """
        return {(depth, match): self._match_of(depth, match) for depth in self.depths for match in self.match}

    def _match_of(self, depth: int, match: str) -> Size:
        count = self.parameters if match == "parameters" else self.operations

        def shallow(value: int) -> Size:
            return replace(self.shallow, **{"batch_size" if match == "batch" else "width": value})

        return shallow(nearest(lambda value: count(shallow(value)), count(replace(self.shallow, depth=depth))))

    @cached_property
    def sizes(self) -> dict[Size, list[str]]:
        """
        :return: What is trained, and what each stands for
        """
        sizes: dict[Size, list[str]] = {self.shallow: ["shallow"]}
        names = {
            "parameters": "wider, parameters of depth {}",
            "operations": "wider, operations of depth {}",
            "batch": "larger batch, operations of depth {}",
        }
        for depth in self.depths:
            sizes.setdefault(Size(depth, self.width, self.batch_size), []).append("deeper")
            for match in self.match:
                sizes.setdefault(self.matches[depth, match], []).append(names[match].format(depth))
        for depth in (self.depth, *self.depths):
            for batch_size in self.batch_sizes:
                sizes.setdefault(Size(depth, self.width, batch_size), ["other batch"])
        return sizes

    def settings(self) -> dict[str, Run]:
        return {str(size): self._run_of(size) for size in self.sizes}

    def report(self, results: Results, runs: Path) -> Report:
        columns = {
            str(size): {**asdict(size), "parameters": self.parameters(size), "operations": self.operations(size)}
            for size in self.sizes
        }
        table = []
        for size, names in self.sizes.items():
            summary = summarize(results[str(size)])
            counts = columns[str(size)]
            table.append(
                {
                    "": "; ".join(names),
                    "size": size,
                    "parameters": f"{counts['parameters']:,}",
                    "10^9 operations an update": f"{counts['operations'] / 1e9:.4g}",
                    **{name: summary[name] for name in ("time at goal", "each seed", "success", "seconds")},
                }
            )
        estimates = {size: final_estimate(results[str(size)]) for size in self.sizes}
        notes = [
            self.protocol(),
            "Parameters are those of the actor and both encoders, operations those of the matrix products in an update.",
            *self._comparisons(estimates),
        ]
        return Report(
            f"Depth, width and batch size on {self.env}", rows_of(results, columns), table, notes, self._figure(estimates)
        )

    def _comparisons(self, estimates: Mapping[Size, Estimate]) -> list[str]:
        """
        :param estimates: Time at goal by size
        :return: Each deeper network against its matches, and the largest batch against the smallest at each depth
        """
        pairs = []
        for (depth, match), size in self.matches.items():
            what = "parameters" if match == "parameters" else "operations an update"
            pairs.append((replace(self.shallow, depth=depth), size, f", which has as many {what}"))
        if len(self.batch_sizes) > 1:
            for depth in (self.depth, *self.depths):
                least, most = (Size(depth, self.width, edge(self.batch_sizes)) for edge in (min, max))
                pairs.append((most, least, ""))
        return [
            f"Time at goal of {size} against {other}{why}: {estimates[size].compare(estimates[other])}."
            for size, other, why in pairs
        ]

    def _figure(self, estimates: Mapping[Size, Estimate]) -> Any:
        figure, axes = new_figure(1, 3, width=4.4)
        lines = {
            "deeper": (lambda size: (size.width, size.batch_size) == (self.width, self.batch_size), "tab:blue"),
            "wider": (lambda size: (size.depth, size.batch_size) == (self.depth, self.batch_size), "tab:orange"),
            "other batch": (lambda size: (size.depth, size.width) == (self.depth, self.width), "tab:green"),
        }
        counts = {"million parameters": (self.parameters, 1e6), "10^9 operations an update": (self.operations, 1e9)}
        for ax, (name, (count, unit)) in zip(axes[0], counts.items(), strict=False):
            for label, (belongs, color) in lines.items():
                # Another batch has as many parameters
                if label != "other batch" or count == self.operations:
                    points = {count(size) / unit: estimates[size] for size in estimates if belongs(size)}
                    self._draw(ax, points, label, color)
            ax.set(xlabel=name)
        ax = axes[0, 2]
        for depth, color in depth_colors([self.depth, *self.depths]).items():
            sizes = [size for size in estimates if (size.depth, size.width) == (depth, self.width)]
            self._draw(ax, {size.batch_size: estimates[size] for size in sizes}, f"depth {depth}", color)
        ax.set(xlabel="batch size")
        for ax in axes[0]:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:.4g}")
            ax.set_ylim(bottom=0)
            ax.set_ylabel("time at goal (steps)")
            ax.legend()
        figure.suptitle(self.caption())
        return figure

    @staticmethod
    def _draw(ax: "Axes", points: Mapping[float, Estimate], label: str, color: Any) -> None:
        x = sorted(points)
        draw_estimates(ax, x, [points[value] for value in x], label, color)
