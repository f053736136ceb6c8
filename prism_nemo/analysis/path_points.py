"""Points between models: where they lie, what weight each model has there, and how high the barrier between ends is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_nemo.errors import InputError
from prism_nemo.evaluation.statistics.differences import token_mean


@dataclass(frozen=True, order=True)
class Point:
    """``W = W_A + alpha (W_B - W_A) + beta (W_C - W_B)``.

    Attributes:
        alpha: Along the first update.
        beta: Along the second; 0 where there are two models.
    """

    alpha: float
    beta: float

    @property
    def shares(self) -> tuple[float, float, float]:
        """Weight of each model: ``(1 - alpha) W_A + (alpha - beta) W_B + beta W_C``, the same W.

        In this form a model is exactly itself at its own point; with differences, a weight that is small beside its
        update would come back rounded.
        """
        return 1 - self.alpha, self.alpha - self.beta, self.beta


def fractions_of(given: Sequence[float] | int, name: str) -> list[float]:
    """Fractions from 0 to 1: as given, in order, with both ends; or so many evenly spaced ones.

    Raises:
        InputError: For fractions outside 0 to 1, given twice, or fewer than two of them.
    """
    if isinstance(given, int):
        if given < 2:
            raise InputError(f"{name}: {given} points do not make a path; use at least 2")
        return [i / (given - 1) for i in range(given)]
    values = sorted({float(value) for value in given} | {0.0, 1.0})
    if len(set(given)) != len(given) or not all(0 <= value <= 1 for value in values):
        raise InputError(f"{name}: {', '.join(map(str, given))}: fractions lie in 0 to 1, each given once")
    return values


def path_points(models: int, first: list[float], second: list[float], grid: int) -> list[Point]:
    """Points of the path A to B (to C), then those of a grid that are not on it.

    Args:
        models: 2 or 3.
        first: Fractions between A and B.
        second: Fractions between B and C; not read for two models.
        grid: Points along each side of the square of alpha and beta, of three models; 0 for none.

    Raises:
        InputError: For another number of models, or a grid that has no sides.
    """
    if models not in (2, 3):
        raise InputError(f"models: a path leads through 2 or 3 models, not {models}")
    points = [Point(alpha, 0.0) for alpha in first]
    if models == 3:
        points += [Point(1.0, beta) for beta in second if beta > 0]
    if grid:
        if models == 2 or grid < 2:
            raise InputError("grid: needs three models and at least 2 points along each side")
        sides = [i / (grid - 1) for i in range(grid)]
        points += [point for a in sides for b in sides if (point := Point(a, b)) not in points]
    return points


def segments_of(models: int, points: Sequence[Point]) -> dict[str, list[tuple[float, Point]]]:
    """The straight stretches of a path, each with the fraction of each of its points."""
    found = {"A-B": sorted((p.alpha, p) for p in points if p.beta == 0)}
    if models == 3:
        found["B-C"] = sorted((p.beta, p) for p in points if p.alpha == 1)
    return found


def barrier(
    stretch: Sequence[tuple[float, Point]], losses: dict[Point, list[float]], tokens: Sequence[float], confidence: float
) -> dict[str, Any]:
    """The largest rise of the loss above the straight line between the losses of the ends.

    Frankle et al. 2020 (arXiv 1912.05671) call models without one linearly connected. Taken row by row, so that how
    hard a text is cancels; the interval is that of the highest point, not corrected for having been picked.

    Args:
        stretch: (fraction, point), from 0 to 1.
        losses: Of each row, in nats per token, at each point.
        tokens: Of each row.
        confidence: 0.95 for 95 %.

    Returns:
        ``height`` (0 if no point lies above the line), ``at`` (fraction), ``low`` and ``high``.
    """
    start, end = (np.array(losses[point]) for _, point in (stretch[0], stretch[-1]))
    best: dict[str, Any] = {"height": 0.0, "at": None, "low": None, "high": None}
    for fraction, point in stretch[1:-1]:
        rise = np.array(losses[point]) - ((1 - fraction) * start + fraction * end)
        found = token_mean(rise.tolist(), tokens, confidence)
        if found.estimate > best["height"]:
            best = {"height": found.estimate, "at": fraction, "low": found.low, "high": found.high}
    return best
