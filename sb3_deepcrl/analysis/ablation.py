from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sb3_deepcrl.analysis.runs import Expression, Run
from sb3_deepcrl.analysis.statistics import Estimate
from sb3_deepcrl.analysis.study import ComparisonOfDepths
from sb3_deepcrl.common.utils import check_choice

NO_RESIDUAL, NO_NORM, RELU = {"residual": False}, {"norm": "none"}, {"activation_fn": Expression("nn.ReLU")}
DEFAULT, RARE = {"transitions_per_update": 16}, {"transitions_per_update": 40}
# By table and name of a variant, the hyperparameters that it changes. The first of a table is what others are compared with
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    # What deep networks need (figures 5 and 16 of the paper)
    "network": {
        "complete": {},
        "no-residual": {"policy_kwargs": NO_RESIDUAL},
        "no-norm": {"policy_kwargs": NO_NORM},
        "relu": {"policy_kwargs": RELU},
        "plain": {"policy_kwargs": {**NO_RESIDUAL, **NO_NORM, **RELU}},
    },
    # The factor of the residual branches, 1 is the paper's
    "residual_scale": {f"scale {scale}": {"policy_kwargs": {"residual_scale": scale}} for scale in ("learnable", "1/N", 1)},
    # The departures from the paper taken back (docs/guide/differences.md)
    "departures": {
        "default": DEFAULT,
        "random_goals=0": {**DEFAULT, "random_goals": 0.0},
        "ent_coef=auto": {**DEFAULT, "ent_coef": "auto"},
        "1 update for 40 transitions": RARE,
        "all three": {**RARE, "random_goals": 0.0, "ent_coef": "auto"},
    },
    # Of the matrix products
    "precision": {precision: {"precision": precision} for precision in ("float32", "bfloat16")},
}


@dataclass(kw_only=True)
class AblationStudy(ComparisonOfDepths):
    """
    What deep networks need (figures 5 and 16).

    Variants of DeepCRL side by side: the complete network, the same
    without residual connections, without layer normalization, with ReLU in place of Swish, and with all three of these
    changes. Or another table.
    """

    name: ClassVar[str] = "ablation"

    depths: tuple[int, ...] = (16,)
    """Depths"""
    table: Literal["network", "residual_scale", "departures", "precision"] = "network"
    """What varies: the network, the factor of the residual branches, the departures from the paper, the precision"""
    variants: tuple[str, ...] = ()
    """Names of variants, by default all of the table"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for variant in self.variants:
            check_choice(variant, tuple(TABLES[self.table]), "variants")

    @property
    def _variants(self) -> tuple[str, ...]:
        return self.variants or tuple(TABLES[self.table])

    def settings(self) -> dict[str, Run]:
        return {
            f"{variant}, depth {depth}": self.make_run(depth=depth, **TABLES[self.table][variant])
            for depth in self.depths
            for variant in self._variants
        }

    def compare(self, estimates: dict[str, Estimate]) -> list[str]:
        first, *others = self._variants
        return [
            f"Time at goal of {variant}, depth {depth}, against {first}: "
            f"{estimates[f'{variant}, depth {depth}'].compare(estimates[f'{first}, depth {depth}'])}."
            for depth in self.depths
            for variant in others
        ]
