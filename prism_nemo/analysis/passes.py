"""Compiled passes over blocks of weights: how far each weight moved, and where two updates agree.

Everything that is said of a pair of checkpoints is a function of a few sums and of one table of counts, so a pass reads
each weight once. Compiled with numba: the same in numpy makes a dozen temporary arrays. The passes hold no lock of
Python's, so threads run them at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from prism_nemo.compiled import kept_on_disk

THRESHOLDS_PERCENT: tuple[float, ...] = (0.1, 0.5, 1, 2, 5, 10)
# Level of a weight: 0 equal, 1 changed by 0.1 % or less, then one more for each threshold that its change exceeds.
LEVELS = len(THRESHOLDS_PERCENT) + 2
# Magnitudes are told apart as bf16 does: the upper 15 bits after the sign of an fp32 number.
MAGNITUDES = 1 << 15
# Two updates are compared by binary exponent of the first one's weight.
EXPONENTS = 256


def limits(dtype: Any) -> np.ndarray[Any, Any]:
    """The thresholds as factors, [6], for numbers of a type.

    In fp32 they are rounded up. For two bf16 numbers the comparison is exact then: near a threshold their difference is
    exact, and it equals the product or differs by 2e-6 of it at least (both are small multiples of a power of two, the
    thresholds of 1/1000) while fp32 rounds by 1e-7. A product rounded down could make a tie a change.
    """
    exact = np.array(THRESHOLDS_PERCENT, np.float64) / 100
    rounded = exact.astype(dtype)
    return np.where(rounded < exact, np.nextafter(rounded, dtype(np.inf)), rounded).astype(dtype)


def _compiled(function: Callable[..., Any]) -> Any:
    return kept_on_disk(function, fastmath={"reassoc", "contract"})


@_compiled
def levels(a: Any, b: Any, factors: Any, level: Any) -> None:
    """Level of each weight; a before, b after, both of one type, level uint8."""
    t0, t1, t2, t3, t4, t5 = factors[0], factors[1], factors[2], factors[3], factors[4], factors[5]
    for i in range(a.size):
        change, size = abs(b[i] - a[i]), abs(a[i])
        found = np.uint8(change > 0)
        found += np.uint8(change > size * t0)
        found += np.uint8(change > size * t1)
        found += np.uint8(change > size * t2)
        found += np.uint8(change > size * t3)
        found += np.uint8(change > size * t4)
        found += np.uint8(change > size * t5)
        level[i] = found


@_compiled
def sums(a: Any, b: Any) -> Any:
    """Sums in fp64 of a^2, (b - a)^2 and a (b - a); and how many weights changed their sign."""
    before = change = along = 0.0
    flips: Any = 0
    for i in range(a.size):
        x, y = np.float64(a[i]), np.float64(b[i])
        d = y - x
        before += x * x
        change += d * d
        along += x * d
        flips += ((x < 0) & (y > 0)) | ((x > 0) & (y < 0))
    return before, change, along, flips


@_compiled
def count(bits: Any, level: Any, table: Any) -> None:
    """Add to table [MAGNITUDES * LEVELS]; bits are those of the weights before, in fp32, as uint32."""
    for i in range(bits.size):
        table[((bits[i] >> 16) & 0x7FFF) * LEVELS + level[i]] += 1


@_compiled
def change(a: Any, b: Any, bits: Any, factors: Any, level: Any, table: Any) -> Any:
    """`levels`, `count` and `sums` in one call: a call takes as long as hundreds of weights."""
    levels(a, b, factors, level)
    count(bits, level, table)
    return sums(a, b)


@_compiled
def same_in_bf16(a: Any, b: Any) -> Any:
    """How many pairs are equal once rounded to bf16 (to nearest, ties to even); bits of fp32 numbers as uint32.

    Zeros of either sign are equal.
    """
    same: Any = 0
    for i in range(a.size):
        x, y = np.uint32(a[i]), np.uint32(b[i])
        p = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        q = (y + np.uint32(0x7FFF) + ((y >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        same += (p == q) | (((p | q) & 0x7FFF) == 0)
    return same


@_compiled
def together(a: Any, b: Any, c: Any, d: Any, first: Any, second: Any, exponents: Any, table: Any) -> float:
    """Two updates, a to b and c to d, with the levels of both.

    Adds to table [EXPONENTS * LEVELS * LEVELS * 2]: exponent of a (bits of fp32 as uint32), both levels, and whether
    both moved the same way. Returns the sum of (b - a) (d - c) in fp64.
    """
    product = 0.0
    for i in range(a.size):
        product += (np.float64(b[i]) - np.float64(a[i])) * (np.float64(d[i]) - np.float64(c[i]))
    for i in range(a.size):
        same = (b[i] > a[i]) == (d[i] > c[i])
        where = (((exponents[i] >> 23) & 0xFF) * LEVELS + first[i]) * LEVELS * 2 + second[i] * 2 + same
        table[where] += 1
    return product
