"""From thousands of noisy points to a curve that can be read: smoothing, its band, and thinning."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

# More points than this cannot be told apart in a chart of 1,000 pixels, and would only make the file large.
MOST_POINTS = 240
# Series of more points than this are condensed with numpy before they are drawn.
CONDENSE_FROM = 5000
# Below this many points each one is drawn as it is.
FEWEST_TO_SMOOTH = 12


@dataclass(frozen=True)
class Point:
    """One point of a smoothed curve: the mean of its window, and the edges of a band that holds every value."""

    x: float
    mean: float
    low: float
    high: float


def runs(x: Sequence[float], y: Sequence[float]) -> list[tuple[list[float], list[float]]]:
    """Splits a series at the points that are not finite, so that a gap is drawn as a gap."""
    parts: list[tuple[list[float], list[float]]] = []
    open_part = False
    for px, py in zip(x, y, strict=True):
        if not (math.isfinite(px) and math.isfinite(py)):
            open_part = False
            continue
        if not open_part:
            parts.append(([], []))
            open_part = True
        parts[-1][0].append(px)
        parts[-1][1].append(py)
    return parts


def pieces(
    x: Sequence[float], y: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> list[tuple[list[float], list[float], list[float], list[float]]]:
    """Splits a condensed series at its gaps; low and high are empty for a series that was not condensed."""
    if not low:
        return [(xs, ys, [], []) for xs, ys in runs(x, y)]
    found, place = [], {px: number for number, px in enumerate(x)}
    for xs, ys in runs(x, y):
        inside = [place[px] for px in xs]
        found.append((xs, ys, [low[number] for number in inside], [high[number] for number in inside]))
    return found


def condense(x: Numbers, y: Numbers, most: int = MOST_POINTS) -> tuple[list[float], ...]:
    """Means of equally many neighbouring steps, with the least and the greatest value of each window.

    For series of more points than `smooth` could visit one by one. A window that holds a value that is not finite
    becomes a gap: the curve must not run across a step whose loss was NaN.

    Args:
        x: Steps, in order.
        y: Values; NaN where one was not finite.
        most: Windows.

    Returns:
        x, y, low and high; of a short series x and y as they are, and two empty lists.
    """
    if len(x) <= CONDENSE_FROM:
        return x.tolist(), y.tolist(), [], []
    starts = np.unique(np.linspace(0, len(x), most, endpoint=False).astype(np.int64))
    sizes = np.diff(np.append(starts, len(x)))
    # The first and the last window stand where the series begins and ends.
    middle = x[starts + sizes // 2]
    middle[0], middle[-1] = x[0], x[-1]
    means = np.add.reduceat(y, starts) / sizes
    return (
        middle.tolist(),
        means.tolist(),
        np.minimum.reduceat(y, starts).tolist(),
        np.maximum.reduceat(y, starts).tolist(),
    )


def window(count: int) -> int:
    """Returns how many neighbours on each side the smoothing takes: about a fortieth of the series."""
    return 0 if count < FEWEST_TO_SMOOTH else max(1, count // 40)


def smooth(x: Sequence[float], y: Sequence[float], half: int) -> list[Point]:
    """Smooths finite values with a centred mean, and puts a band around it that holds every single value.

    The window shrinks towards both ends, so that the first and the last point are those that were measured. The edge of
    the band is the mean of the extremes of neighbouring windows: each of these windows holds the point in their middle,
    so no mean of their extremes can cut it off. A percentile would be as smooth, and would hide a spike of the loss.

    Args:
        x: Positions, in order.
        y: Finite values.
        half: Neighbours on each side.

    Returns:
        At most `MOST_POINTS` points.
    """
    sums = _sums(y)
    lows = _sums([-value for value in _highest([-value for value in y], half)])
    highs = _sums(_highest(y, half))
    points = []
    for place in thin(len(x)):
        reach = min(half, place, len(x) - 1 - place)
        ends = max(0, place - half), min(len(x), place + half + 1)
        points.append(
            Point(x[place], _mean(sums, place - reach, place + reach + 1), _mean(lows, *ends), _mean(highs, *ends))
        )
    return points


def _highest(y: Sequence[float], half: int) -> list[float]:
    """Returns the largest value among each point and its neighbours, in one pass."""
    found: list[float] = []
    falling: deque[int] = deque()
    for place in range(len(y) + half):
        if place < len(y):
            while falling and y[falling[-1]] <= y[place]:
                falling.pop()
            falling.append(place)
        centre = place - half
        if centre >= 0:
            while falling[0] < centre - half:
                falling.popleft()
            found.append(y[falling[0]])
    return found


def _sums(y: Sequence[float]) -> list[float]:
    return [0.0, *itertools.accumulate(y)]


def _mean(sums: Sequence[float], start: int, end: int) -> float:
    return (sums[end] - sums[start]) / (end - start)


def thin(count: int, most: int = MOST_POINTS) -> list[int]:
    """Returns at most `most` evenly spaced indices, the first and the last always among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})
