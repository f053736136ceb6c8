"""The normal and Student's t distribution, and Wilson's interval, in plain Python; scipy is no dependency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, all in the unit of the data (a share from 0 to 1, or a difference)."""

    estimate: float
    low: float
    high: float


def normal_quantile(confidence: float) -> float:
    """Two-sided quantile of the normal distribution: 1.96 for 0.95.

    Raises:
        ValueError: Confidence outside 0 to 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1 (0.95 for 95 %), got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def t_inside(t: float, freedom: int) -> float:
    """P(|T| <= t) for t of 0 or more and integer degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for j in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= (j + 1) / (j + 2) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache(maxsize=1024)
def t_quantile(confidence: float, freedom: int) -> float:
    """Two-sided quantile of Student's t: 12.706 for 0.95 and 1 degree of freedom."""
    z = normal_quantile(confidence)
    if freedom > 200:  # Abramowitz and Stegun 26.7.5; beyond 200 the next term is below 1e-9 of the result at 0.95
        g1 = (z**3 + z) / 4
        g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3
    low, high = z, 2 * z
    while t_inside(high, freedom) < confidence:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def p_value(t: float, freedom: int) -> float:
    """Two-sided p-value of a t statistic; beyond 10,000 degrees of freedom that of the normal distribution."""
    if freedom > 10_000:
        return math.erfc(abs(t) / math.sqrt(2))
    return max(0.0, 1.0 - t_inside(abs(t), freedom))


def wilson(share: float, n: float, z: float) -> Interval:
    """Wilson's interval for a share of n trials, where n may be an effective (fractional) number."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The ends are exactly 0 and 1 at these shares; rounding would leave 1e-19 or a negative number.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return Interval(share, low, high)


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979): below 0.05 where a finding survives that so many were looked at.

    Args:
        p_values: One for each comparison, in any order.

    Returns:
        The adjusted ones, in the same order; never below the plain ones, never above 1.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted
