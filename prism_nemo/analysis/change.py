"""What is said of how a set of weights changed, and of two updates of the same weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prism_nemo.analysis.passes import THRESHOLDS_PERCENT
from prism_nemo.analysis.tally import JointTally, Tally

KEYS = tuple(f"{percent:g}" for percent in THRESHOLDS_PERCENT)
ONE_PERCENT = 2 + THRESHOLDS_PERCENT.index(1)  # lowest level of a change above 1 %
_DECILES = 10


@dataclass(frozen=True)
class WeightChange:
    """Change of one set of parameters (a tensor, a component, a layer or everything).

    Attributes:
        parameters: number of parameters compared.
        thresholds: for each threshold t in percent (keys "0.1", "0.5", "1", "2", "5", "10") the share, 0 to 1, of
            parameters with |b - a| > t/100 * |a|. Where a == 0 this reads |b| > 0: any non-zero b counts as changed at
            every threshold, and a zero that stayed zero never does.
        equal_fraction: share with b == a by value, so -0.0 equals 0.0.
        bf16_equal_fraction: share with b == a after rounding both to bf16: what inference in bf16 cannot tell apart.
        relative_l2: ||b - a|| / ||a|| (Eq. 1, Frobenius norm); None where a is all zeros and b is not (undefined), 0.0
            where both are.
        update_norm: ||b - a||.
        weight_norm: ||a||.
        drift: <a, b - a> / ||a||^2, the change along the weights themselves: -0.066 where weight decay alone took
            6.6 %; None where a is all zeros.
        sign_flip_fraction: share whose sign changed; zero has none.
        deciles: share changed by more than 1 % in each tenth of the parameters by |a|, the smallest first. Magnitudes
            are told apart as bf16 does; the members of one magnitude are spread over the tenths that it lies in.
    """

    parameters: int
    thresholds: dict[str, float]
    equal_fraction: float
    bf16_equal_fraction: float
    relative_l2: float | None
    update_norm: float = 0.0
    weight_norm: float = 0.0
    drift: float | None = None
    sign_flip_fraction: float = 0.0
    deciles: tuple[float, ...] = field(default_factory=tuple)

    @property
    def changed_fraction_1pct(self) -> float:
        """Share of parameters, 0 to 1, whose relative change is above 1 %: the measure of Table 23."""
        return self.thresholds["1"]

    def to_dict(self) -> dict[str, Any]:
        """The measures as plain JSON values."""
        return {
            "parameters": self.parameters,
            "changed_fraction_1pct": self.changed_fraction_1pct,
            "relative_l2": self.relative_l2,
            "thresholds": dict(self.thresholds),
            "equal_fraction": self.equal_fraction,
            "bf16_equal_fraction": self.bf16_equal_fraction,
            "update_norm": self.update_norm,
            "weight_norm": self.weight_norm,
            "drift": self.drift,
            "sign_flip_fraction": self.sign_flip_fraction,
            "deciles": list(self.deciles),
        }


def change_of(tally: Tally) -> WeightChange:
    """The measures of a tally of at least one weight."""
    by_level, sizes = tally.table.counts.sum(axis=0), tally.table.counts.sum(axis=1)
    above = by_level[::-1].cumsum()[::-1]  # at least of that level
    relative: float | None = 0.0
    if tally.change > 0:
        relative = math.sqrt(tally.change / tally.before) if tally.before > 0 else None
    return WeightChange(
        parameters=tally.parameters,
        thresholds={key: int(above[2 + i]) / tally.parameters for i, key in enumerate(KEYS)},
        equal_fraction=int(by_level[0]) / tally.parameters,
        bf16_equal_fraction=tally.bf16_equal / tally.parameters,
        relative_l2=relative,
        update_norm=math.sqrt(tally.change),
        weight_norm=math.sqrt(tally.before),
        drift=tally.along / tally.before if tally.before > 0 else None,
        sign_flip_fraction=tally.flips / tally.parameters,
        deciles=tuple(deciles(sizes, tally.table.counts[:, ONE_PERCENT:].sum(axis=1) / sizes)),
    )


def deciles(sizes: np.ndarray, changed: np.ndarray) -> list[float]:
    """Share changed in each tenth of the weights by magnitude; fewer tenths of fewer than ten weights.

    Args:
        sizes: [k] number of weights of each magnitude, the smallest magnitude first.
        changed: [k] share of them that changed.

    Returns:
        [10]; a tenth without a weight (fewer than ten weights) is left out.
    """
    ends = sizes.cumsum().astype(np.float64)
    total = ends[-1]
    shares = []
    count = min(_DECILES, int(total))
    for k in range(count):
        low, high = total * k / count, total * (k + 1) / count
        inside = np.clip(np.minimum(ends, high) - np.maximum(ends - sizes, low), 0, None)
        shares.append(float((inside * changed).sum() / inside.sum()))
    return shares


@dataclass(frozen=True)
class Overlap:
    """How two updates of the same weights lie to each other.

    Attributes:
        cosine: of both updates as vectors; None where one of them is zero.
        jaccard: for each threshold in percent, and "0" for any change: |A and B| / |A or B| of the sets of weights that
            the two updates changed by more; None where both are empty.
        by_chance: what it would be for sets of these sizes drawn independently.
        by_size_of_weight: the same, drawn independently among weights of the same binary exponent: small weights pass a
            relative threshold first in any update, so this is the chance to compare with.
        same_sign: of the weights that both updates changed, the share that moved the same way (0.5 by chance); None
            where there are none.
        same_sign_1pct: the same of those that both changed by more than 1 %.
    """

    cosine: float | None
    jaccard: dict[str, float | None]
    by_chance: dict[str, float | None]
    by_size_of_weight: dict[str, float | None]
    same_sign: float | None
    same_sign_1pct: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "cosine": self.cosine, "jaccard": dict(self.jaccard), "by_chance": dict(self.by_chance),
            "by_size_of_weight": dict(self.by_size_of_weight), "same_sign": self.same_sign,
            "same_sign_1pct": self.same_sign_1pct,
        }  # fmt: skip


def overlap_of(joint: JointTally, first: Tally, second: Tally) -> Overlap:
    """The measures of two updates from what was counted of both together and of each."""
    norms = math.sqrt(first.change) * math.sqrt(second.change)
    jaccard: dict[str, float | None] = {}
    chance: dict[str, float | None] = {}
    sized: dict[str, float | None] = {}
    for key, level in (("0", 1), *((key, 2 + i) for i, key in enumerate(KEYS))):
        one = joint.table[:, level:, :, :].sum(axis=(1, 2, 3)).astype(np.float64)  # by exponent
        two = joint.table[:, :, level:, :].sum(axis=(1, 2, 3)).astype(np.float64)
        both = float(joint.table[:, level:, level:, :].sum())
        all_of = joint.table.sum(axis=(1, 2, 3)).astype(np.float64)
        jaccard[key] = _jaccard(both, one.sum(), two.sum())
        chance[key] = _jaccard(one.sum() * two.sum() / all_of.sum(), one.sum(), two.sum())
        sized[key] = _jaccard(float((one * two / np.maximum(all_of, 1)).sum()), one.sum(), two.sum())
    return Overlap(
        joint.product / norms if norms > 0 else None,
        jaccard,
        chance,
        sized,
        _same_sign(joint, 1),
        _same_sign(joint, ONE_PERCENT),
    )


def _jaccard(both: float, one: float, two: float) -> float | None:
    union = one + two - both
    return float(both / union) if union > 0 else None


def _same_sign(joint: JointTally, level: int) -> float | None:
    moved = joint.table[:, level:, level:, :].sum(axis=(0, 1, 2))
    return float(moved[1] / moved.sum()) if moved.sum() else None
