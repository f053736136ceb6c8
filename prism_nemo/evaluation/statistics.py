"""Intervals and tests for benchmark scores, in plain Python and numpy.

Which one to use:
- one sample per question: `wilson_interval`;
- several samples per question: `clustered_interval`, because samples of one question resemble each other;
- an average of averages (seeds, benchmarks): `mean_interval`;
- two models on the same questions: `paired_difference` and `mcnemar_exact`, which are far more sensitive than two
  separate intervals. `intervals_apart` is the cautious reading of two intervals: overlap does not show equality.

All of them describe the sampling of questions only. They say nothing of the variation between training seeds, and
nothing is corrected for choosing the best of many checkpoints on the same test set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, all in the unit of the data (a share from 0 to 1, or a difference)."""

    estimate: float
    low: float
    high: float


def _z(confidence: float) -> float:
    """Two-sided quantile of the normal distribution: 1.96 for 0.95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1 (0.95 for 95 %), got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _t_inside(t: float, freedom: int) -> float:
    """P(|T| <= t) for integer degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for j in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= (j + 1) / (j + 2) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _t(confidence: float, freedom: int) -> float:
    """Two-sided quantile of Student's t: 12.706 for 0.95 and 1 degree of freedom."""
    z = _z(confidence)
    if freedom > 200:  # Abramowitz and Stegun 26.7.5; beyond 200 the next term is below 1e-9 of the result at 0.95
        g1 = (z**3 + z) / 4
        g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3
    low, high = z, 2 * z
    while _t_inside(high, freedom) < confidence:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def _wilson(share: float, n: float, z: float) -> Interval:
    """Wilson's interval for a share of n trials, where n may be an effective (fractional) number."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The ends are exactly 0 and 1 at these shares; rounding would leave 1e-19 or a negative number.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return Interval(share, low, high)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share (Wilson 1927), good for small n and for shares near 0 and 1.

    Args:
        successes: number of right answers, 0 to n.
        n: number of independent questions.
        confidence: 0.95 for 95 %.

    Returns:
        The share with its interval, within 0 to 1. For 0 of 256 it is 0 to 0.0148.

    Raises:
        ValueError: n is 0, successes is outside 0 to n, confidence outside 0 to 1.
    """
    if n < 1:
        raise ValueError("no questions (n = 0): a share of nothing has no interval")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0 to {n}, got {successes}")
    return _wilson(successes / n, n, _z(confidence))


def _numbers(values: Sequence[float], what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{what}: a non-empty list of numbers is needed, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what}: holds NaN or Inf")
    return array


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of independent values, such as averages by cluster, by seed or by benchmark.

    Args:
        values: at least two. Samples within a cluster are not independent: average each cluster first.
        confidence: 0.95 for 95 %.

    Returns:
        Mean -+ t(n - 1) * s / sqrt(n); of width 0 where all values are equal. Not cut to 0 to 1.

    Raises:
        ValueError: fewer than two values, NaN or Inf, confidence outside 0 to 1.
    """
    array = _numbers(values, "values")
    if array.size < 2:
        raise ValueError("one value has no spread: at least two are needed")
    mean = float(array.mean())
    half = _t(confidence, array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half)


def clustered_interval(correct: Sequence[Sequence[float]], confidence: float = 0.95) -> Interval:
    """Interval for average accuracy when several samples are drawn for each question.

    The standard error is clustered by question (Miller 2024, arXiv 2411.00640): it is that of the question averages, so
    repeating ten questions a hundred times is not taken for a thousand questions. As accuracies may be near 0 or 1,
    where estimate -+ t * error would leave 0 to 1, the error is turned into an effective number of independent samples
    (Kish's design effect, adjusted by t as in Korn and Graubard 1998) and put into Wilson's formula.

    Args:
        correct: for each question the outcomes of its samples, 0 or 1 (or a score in between). The numbers of samples
            may differ; every question has the same weight.
        confidence: 0.95 for 95 %.

    Returns:
        The mean of the question averages with its interval, within 0 to 1. With one 0/1 sample per question it is
        `wilson_interval`. Where all question averages are equal (all wrong, say) their spread says nothing about how
        alike samples are, and the number of questions is used, the cautious choice.

    Raises:
        ValueError: no questions, a question without samples, outcomes outside 0 to 1, confidence outside 0 to 1.
    """
    z = _z(confidence)
    questions = [_numbers(outcomes, f"question {i}") for i, outcomes in enumerate(correct)]
    if not questions:
        raise ValueError("no questions (n = 0): an average of nothing has no interval")
    for i, outcomes in enumerate(questions):
        if outcomes.min() < 0 or outcomes.max() > 1:
            raise ValueError(f"question {i}: outcomes must lie in 0 to 1, got {outcomes.min():g} to {outcomes.max():g}")
    n = len(questions)
    means = np.array([outcomes.mean() for outcomes in questions])
    share = float(means.mean())
    if all(outcomes.size == 1 and outcomes[0] in (0, 1) for outcomes in questions):
        return wilson_interval(int(means.sum()), n, confidence)
    if np.ptp(means) == 0:  # also for a single question
        return _wilson(share, n, z)
    error_squared = float(means.var(ddof=1)) / n
    effective = share * (1 - share) / error_squared * (z / _t(confidence, n - 1)) ** 2
    # Negative correlation within questions arises by chance only: never claim more than independent samples would give.
    return _wilson(share, min(effective, float(sum(outcomes.size for outcomes in questions))), z)


def intervals_apart(a: Interval, b: Interval) -> bool:
    """Whether two intervals have no point in common; ends that touch do."""
    return a.high < b.low or b.high < a.low


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = _numbers(a, "a"), _numbers(b, "b")
    if first.size != second.size:
        raise ValueError(
            f"a has {first.size} questions, b has {second.size}; both need the same ones in the same order"
        )
    for name, values in (("a", first), ("b", second)):
        if values.min() < 0 or values.max() > 1:
            raise ValueError(f"{name}: outcomes must lie in 0 to 1, got {values.min():g} to {values.max():g}")
    return first, second


def paired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """How much better b does than a on the same questions, with a paired percentile bootstrap interval (Efron 1979).

    Args:
        a: outcome per question of one model, 0 or 1, or the average of its samples.
        b: the same of the other model, in the same order.
        confidence: 0.95 for 95 %.
        resamples: bootstrap resamples of the questions, at least 100; one question's pair stays together.
        seed: of the resampling; equal seeds give equal intervals.

    Returns:
        mean(b) - mean(a), within -1 to 1, with its interval. Where all questions differ by the same amount every
        resample is equal, and a width of 0 would claim certainty; there the interval allows for the share of different
        questions that Wilson's interval leaves open after n questions without one.

    Raises:
        ValueError: no questions, numbers of questions differ, outcomes outside 0 to 1, resamples below 100.
    """
    first, second = _paired(a, b)
    z = _z(confidence)
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100 for an interval, got {resamples}")
    differences = second - first
    n, estimate = differences.size, float(differences.mean())
    if np.ptp(differences) < 1e-12:  # equal but for the rounding of averages
        unseen = _wilson(0.0, n, z).high
        return Interval(estimate, (1 - unseen) * estimate - unseen, (1 - unseen) * estimate + unseen)
    rng = np.random.default_rng(seed)
    block = max(1, (1 << 20) // n)  # so that the table of drawn questions stays near 8 MiB
    means = [
        differences[rng.integers(0, n, size=(min(block, resamples - done), n))].mean(axis=1)
        for done in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(low), float(high))


def mcnemar_exact(a: Sequence[float], b: Sequence[float]) -> float:
    """Exact two-sided p-value that two models are equally good on the same questions (McNemar 1947, binomial form).

    Only the questions on which they disagree count: given their number, each is a fair coin if the models are equal.

    Args:
        a: outcome per question of one model, 0 or 1.
        b: the same of the other model, in the same order.

    Returns:
        The p-value, 0 to 1; 1 where they never disagree.

    Raises:
        ValueError: no questions, numbers of questions differ, an outcome is not 0 or 1.
    """
    first, second = _paired(a, b)
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise ValueError("outcomes must be 0 or 1; for averages of several samples use paired_difference")
    only_a, only_b = int((first > second).sum()), int((second > first).sum())
    disagreements, term, tail = only_a + only_b, 1, 1
    for i in range(min(only_a, only_b)):  # exact integers: binomial coefficients up to the smaller count
        term = term * (disagreements - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**disagreements)
