"""Curves of a few hundred points from any number of values, in which a spike stays visible."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BUCKETS = 240

Point = tuple[float, float | None, float | None]


def thin(steps: NDArray[np.float64], values: NDArray[np.float64], buckets: int = BUCKETS) -> list[Point]:
    """Points of a curve: step, lowest and highest value of a bucket of neighbouring steps.

    Args:
        steps: In order.
        values: As many; NaN where a value was not finite.
        buckets: Most points.

    Returns:
        One point for each bucket, at its last step, so that the newest value is the last point. Both values are None
        where no value of the bucket is finite: a gap that the reader must see.
    """
    if not len(steps):
        return []
    points: list[Point] = []
    for part in np.array_split(np.arange(len(steps)), min(buckets, len(steps))):
        known = values[part][np.isfinite(values[part])]
        step = float(steps[part[-1]])
        points.append((step, float(known.min()), float(known.max())) if len(known) else (step, None, None))
    return points


def newest(values: NDArray[np.float64]) -> float | None:
    """The last value, or None if there is none or it is not finite."""
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None
