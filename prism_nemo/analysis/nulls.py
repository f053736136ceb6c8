"""What the measures of a weight change would be if training had learned nothing: null models to put beside them.

The PRISM study (arXiv 2603.17074) reads "more than 90 % of the weights changed" as deep restructuring and "5 %" as
surgical refinement. Four models that know nothing of the data give such numbers too:

- `decay`: weight decay alone. AdamW shrinks every decayed weight by 1 - lr x decay at each step (Loshchilov and Hutter
  2019, arXiv 1711.05101), so after training b = a prod(1 - lr_t decay).
- `random_walk`: Adam's step is about lr in size whatever the gradient's; in random directions the steps add up to a
  Gaussian of standard deviation sqrt(sum lr_t^2), the same for every weight.
- `drift`: every step in one direction: |b - a| = sum lr_t. No update by Adam gets much further (its step is at most lr
  for steady gradients).
- `fitted`: a Gaussian independent of the weight whose one scale is fitted so that the share of weights changed by more
  than 1 % is the observed one; the other thresholds, norms and deciles are then predictions.

Each is applied to the weights that the checkpoint really has (their magnitudes, counted as bf16 tells them apart) and
rounded as the checkpoint is stored. What is left of an observed value beside a null's is what remains to be explained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prism_nemo.analysis.change import KEYS, ONE_PERCENT, change_of, deciles
from prism_nemo.analysis.passes import LEVELS, MAGNITUDES, levels, limits
from prism_nemo.analysis.tally import Table, Tally
from prism_nemo.errors import InputError

Array = np.ndarray
_FACTORS = limits(np.float64)
_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class Schedule:
    """What a stage's optimizer did, as far as a null model needs it.

    Attributes:
        lr_sum: Sum of the learning rates of all steps.
        lr_square_sum: Sum of their squares.
        decay_factor: prod(1 - lr_t weight_decay).
        steps: How many.
    """

    lr_sum: float
    lr_square_sum: float
    decay_factor: float
    steps: int

    @classmethod
    def of(cls, rates: list[float], weight_decay: float) -> Schedule:
        """From the learning rate of each step."""
        return cls(
            math.fsum(rates),
            math.fsum(rate * rate for rate in rates),
            math.exp(math.fsum(math.log1p(-rate * weight_decay) for rate in rates)),
            len(rates),
        )

    def then(self, later: Schedule) -> Schedule:
        """Of two stages, one after the other."""
        return Schedule(
            self.lr_sum + later.lr_sum,
            self.lr_square_sum + later.lr_square_sum,
            self.decay_factor * later.decay_factor,
            self.steps + later.steps,
        )


@dataclass(frozen=True)
class Null:
    """A null model's values of the measures, for one set of weights.

    Attributes:
        name: decay, random_walk, drift or fitted.
        scale: Standard deviation (or size) of the update; for `decay` the share that is taken away.
        thresholds: As `WeightChange.thresholds`.
        equal_fraction: As there.
        bf16_equal_fraction: As there.
        sign_flip_fraction: As there.
        relative_l2: As there.
        drift: As there.
        deciles: As there.
    """

    name: str
    scale: float
    thresholds: dict[str, float]
    equal_fraction: float
    bf16_equal_fraction: float
    sign_flip_fraction: float
    relative_l2: float | None
    drift: float | None
    deciles: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "name": self.name, "scale": self.scale, "thresholds": dict(self.thresholds),
            "equal_fraction": self.equal_fraction, "bf16_equal_fraction": self.bf16_equal_fraction,
            "sign_flip_fraction": self.sign_flip_fraction, "relative_l2": self.relative_l2, "drift": self.drift,
            "deciles": list(self.deciles),
        }  # fmt: skip


def nulls_of(tally: Tally, bf16: bool, schedule: Schedule | None, decayed: bool = True) -> list[Null]:
    """The null models for a set of weights.

    Args:
        tally: What was observed; its magnitudes are the weights.
        bf16: Whether the later checkpoint is stored in bf16.
        schedule: Of the stages between both checkpoints; without it only the fitted null can be given.
        decayed: Whether weight decay applies to these weights (not to norms and biases).
    """
    found = []
    if schedule is not None:
        if decayed:
            found.append(decay(tally, schedule.decay_factor, bf16))
        found.append(gaussian("random_walk", tally, math.sqrt(schedule.lr_square_sum), bf16))
        found.append(_shifted("drift", tally, schedule.lr_sum, bf16))
    fit = fitted(tally, bf16)
    if fit is not None:
        found.append(fit)
    return found


def fitted(tally: Tally, bf16: bool) -> Null | None:
    """The Gaussian of one scale that changes as many weights by more than 1 % as were observed; None if none or all."""
    share = change_of(tally).thresholds["1"]
    if not 0 < share < 1:
        return None
    sizes = _sizes(tally.table)
    rms = math.sqrt(tally.before / tally.parameters)
    if rms == 0:
        return None

    def changed(scale: float) -> float:
        return float(_shares(tally.table, gaussian_levels(sizes, scale, bf16))[ONE_PERCENT:].sum())

    low, high = rms * 1e-12, rms * 1e6
    for _ in range(100):  # the share grows with the scale
        middle = math.sqrt(low * high)
        low, high = (middle, high) if changed(middle) < share else (low, middle)
    return gaussian("fitted", tally, math.sqrt(low * high), bf16)


def gaussian(name: str, tally: Tally, scale: float, bf16: bool) -> Null:
    """Every weight moved by an independent Gaussian of one standard deviation."""
    sizes = _sizes(tally.table)
    found = gaussian_levels(sizes, scale, bf16)
    rounded = found[:, 0] if bf16 else _stay(sizes, scale)
    norm = scale * math.sqrt(tally.parameters) / math.sqrt(tally.before) if tally.before else None
    flips = np.where(sizes > 0, _tail(sizes, scale), 0.0)  # it has to cross zero
    return _null(name, scale, tally, found, rounded, flips, norm, 0.0 if tally.before else None)


def decay(tally: Tally, factor: float, bf16: bool) -> Null:
    """Every weight multiplied by one factor."""
    sizes = _sizes(tally.table)
    found = _moved(sizes, lambda a: a * factor, bf16)
    rounded = found[:, 0] if bf16 else _stay_shifted(sizes, (1 - factor) * sizes)
    lost = 1 - factor if tally.before > 0 else None
    return _null(
        "decay", 1 - factor, tally, found, rounded, np.zeros(len(sizes)), lost, None if lost is None else -lost
    )


def _shifted(name: str, tally: Tally, size: float, bf16: bool) -> Null:
    sizes = _sizes(tally.table)
    found = (_moved(sizes, lambda a: a + size, bf16) + _moved(sizes, lambda a: a - size, bf16)) / 2
    rounded = found[:, 0] if bf16 else _stay_shifted(sizes, np.full(len(sizes), size))
    norm = size * math.sqrt(tally.parameters) / math.sqrt(tally.before) if tally.before else None
    flips = ((sizes > 0) & (sizes < size)) / 2
    return _null(name, size, tally, found, rounded, flips, norm, 0.0 if tally.before else None)


def gaussian_levels(sizes: Array, scale: float, bf16: bool) -> Array:
    """Probability of each level, [k, LEVELS], for weights of these magnitudes moved by a Gaussian.

    Stored in bf16, a weight moves to the number that is nearest to where it went: it passes a threshold if it comes
    nearer to the first number beyond it than to the one before that.
    """
    if scale <= 0:  # nothing moves; below, fp32 takes any move for a change
        return np.tile(np.eye(1, LEVELS), (len(sizes), 1))
    ups, downs = [], []
    for factor in (0.0, *_FACTORS):
        ups.append(_border(sizes, sizes * (1 + factor), True, bf16) - sizes)
        downs.append(sizes - _border(sizes, sizes * (1 - factor), False, bf16))
    if not bf16:  # any change at all is certain
        ups[0] = downs[0] = np.zeros_like(sizes)
    above = np.stack([_tail(up, scale) + _tail(down, scale) for up, down in zip(ups, downs, strict=True)], axis=1)
    above = np.concatenate([np.ones((len(sizes), 1)), np.minimum(above, 1.0), np.zeros((len(sizes), 1))], axis=1)
    return above[:, :-1] - above[:, 1:]


def _stay(sizes: Array, scale: float) -> Array:
    """Probability that fp32 weights, spread evenly between two numbers of bf16, round as before a Gaussian move.

    With r the spacing over the scale: 1 - 2 int_0^1 Q(r x) dx, Q the Gaussian's tail.
    """
    r = (_next(sizes, True) - sizes) / max(scale, 1e-300)
    with np.errstate(over="ignore"):
        inside = (1 - np.exp(-(np.minimum(r, 1e3) ** 2) / 2)) / (r * math.sqrt(2 * math.pi))
    return np.clip(1 - 2 * (_tail(r, 1.0) + inside), 0.0, 1.0)


def _stay_shifted(sizes: Array, distance: Array) -> Array:
    """The same for a move by a given distance."""
    return np.clip(1 - distance / (_next(sizes, True) - sizes), 0.0, 1.0)


def _tail(distance: Array, scale: float) -> Array:
    """P(u > distance) of a Gaussian."""
    if scale <= 0:
        return np.where(distance > 0, 0.0, 0.5)
    return 0.5 * (1 - _erf(distance / (scale * math.sqrt(2))))


def _border(sizes: Array, limit: Array, up: bool, bf16: bool) -> Array:
    """Where a weight has to come to be stored beyond a limit: the middle between two neighbours in bf16."""
    if not bf16:
        return limit
    nearest = to_bf16(limit)
    past = nearest > limit if up else nearest < limit
    inside = np.where(past, _next(nearest, not up), nearest)  # the last number that is not beyond
    beyond = _next(inside, up)
    return (inside + beyond) / 2


def _next(values: Array, up: bool) -> Array:
    """The neighbour in bf16 of numbers that bf16 has."""
    there = torch.tensor(math.inf if up else -math.inf).bfloat16()
    return np.asarray(torch.nextafter(torch.from_numpy(values).bfloat16(), there).double().numpy())


def to_bf16(values: Array) -> Array:
    """Rounded to bf16, to nearest and ties to even, as float64."""
    return np.asarray(torch.from_numpy(values).bfloat16().double().numpy())


def _moved(sizes: Array, move: Callable[[Array], Array], bf16: bool) -> Array:
    after = move(sizes)
    found = np.empty(len(sizes), np.uint8)
    levels(sizes, to_bf16(after) if bf16 else after, _FACTORS, found)
    return np.eye(LEVELS)[found]


def _sizes(table: Table) -> Array:
    """Magnitude that each row of a table stands for, [k] float64; of fp32 weights the middle of those it holds is a bit
    larger, by 2^-9 at most.
    """
    if len(table.magnitudes) and table.magnitudes.max() >= MAGNITUDES:
        raise InputError("a table of magnitudes holds one that bf16 does not have")
    return (table.magnitudes.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _shares(table: Table, found: Array) -> Array:
    """Share of all weights at each level, [LEVELS]."""
    sizes = table.counts.sum(axis=1)
    return np.asarray(sizes @ found / sizes.sum())


def _null(
    name: str,
    scale: float,
    tally: Tally,
    found: Array,
    rounded: Array,
    flips: Array,
    norm: float | None,
    drift: float | None,
) -> Null:
    """From probabilities by magnitude: levels [k, LEVELS], equality once rounded to bf16, a changed sign."""
    shares = _shares(tally.table, found)
    above = shares[::-1].cumsum()[::-1]
    sizes = tally.table.counts.sum(axis=1)
    return Null(
        name,
        scale,
        {key: float(above[2 + i]) for i, key in enumerate(KEYS)},
        float(shares[0]),
        float(sizes @ rounded / sizes.sum()),
        float(sizes @ flips / sizes.sum()),
        norm,
        drift,
        tuple(deciles(sizes, found[:, ONE_PERCENT:].sum(axis=1))),
    )
