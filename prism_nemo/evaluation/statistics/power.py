"""How small a difference between two models a benchmark can see.

For n questions with k samples each, asked of both models, the paired difference has the standard error

    sqrt((between + within / k) / n)

(Miller 2024, arXiv 2411.00640, section 5), with `between` the variance over questions of the true difference in
accuracy, and `within` the mean over questions of the sum of both models' sampling variances p (1 - p). More samples
shrink the second part alone; only more questions shrink the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from prism_nemo.evaluation.statistics.intervals import checked_questions
from prism_nemo.evaluation.statistics.quantiles import t_quantile


@dataclass(frozen=True)
class Variance:
    """Where the scatter of a paired difference comes from.

    Attributes:
        between: Variance over questions of the true difference; 0 where the second model is better by the same amount
            everywhere. For answers that are certain (greedy), it is nearly the share of the questions that change.
        within: Mean over questions of p (1 - p) of the first model plus that of the second; at most 0.5.
    """

    between: float
    within: float


def variance_of(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Variance:
    """Both parts, estimated without bias from the outcomes of two models.

    Args:
        a: For each question the outcomes of the first model's samples, at least two.
        b: The same of the second model, in the same order.

    Returns:
        The parts; `between` is 0 where the scatter is less than what sampling alone explains.

    Raises:
        ValueError: Fewer than two questions or samples, numbers of questions that differ, outcomes outside 0 to 1.
    """
    first, second = checked_questions(a), checked_questions(b)
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"at least two questions are needed, the same of both models: got {len(first)}, {len(second)}")
    if min(outcomes.size for outcomes in first + second) < 2:
        raise ValueError("one sample per question cannot tell sampling from the questions: at least two are needed")
    spreads = [[o.var(ddof=1) for o in model] for model in (first, second)]
    within = float(np.mean(spreads[0]) + np.mean(spreads[1]))
    noise = sum(
        float(np.mean([v / o.size for v, o in zip(spread, model, strict=True)]))
        for spread, model in zip(spreads, (first, second), strict=True)
    )
    differences = np.array([y.mean() - x.mean() for x, y in zip(first, second, strict=True)])
    return Variance(max(0.0, float(differences.var(ddof=1)) - noise), within)


def standard_error(variance: Variance, questions: int, samples: int) -> float:
    """Of the paired difference of n questions x k samples.

    Raises:
        ValueError: Fewer than 2 questions or 1 sample, or a negative variance.
    """
    if questions < 2 or samples < 1:
        raise ValueError(f"{questions} questions x {samples} samples: at least 2 x 1 are needed")
    if variance.between < 0 or variance.within < 0:
        raise ValueError(f"a variance cannot be negative: {variance}")
    return math.sqrt((variance.between + variance.within / samples) / questions)


def detectable(error: float, freedom: int, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest true difference that is found (its interval leaves 0 out) with probability `power`.

    ``(t + t') * error`` with the two quantiles of Student's t: the usual approximation of the noncentral t, within one
    point of the power from 10 degrees of freedom on (`tests/evaluation/test_power.py` simulates it).

    Args:
        error: Standard error of the difference.
        freedom: Its degrees of freedom; questions - 1.
        power: Between 0.5 and 1 without the ends.
        confidence: Of the interval.

    Raises:
        ValueError: Power out of range.
    """
    if not 0.5 < power < 1:
        raise ValueError(f"power must lie between 0.5 and 1 (0.8 is usual), got {power}")
    return (t_quantile(confidence, freedom) + t_quantile(2 * power - 1, freedom)) * error


def detectable_difference(
    variance: Variance, questions: int, samples: int = 1, power: float = 0.8, confidence: float = 0.95
) -> float:
    """`detectable` of a benchmark of n questions x k samples, in the unit of accuracy (0.01 is one point).

    Raises:
        ValueError: As `standard_error` and `detectable`.
    """
    return detectable(standard_error(variance, questions, samples), questions - 1, power, confidence)


def questions_needed(
    variance: Variance, difference: float, samples: int = 1, power: float = 0.8, confidence: float = 0.95
) -> int:
    """The fewest questions with which `difference` is found with probability `power`.

    Raises:
        ValueError: A difference of 0 or less, and as `detectable_difference`.
    """
    if not difference > 0:
        raise ValueError(f"difference must be above 0, got {difference}")
    z = NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(power)
    # The normal quantiles are smaller than those of t: a lower bound from which to count up.
    n = max(2, math.floor((z * standard_error(variance, 2, samples)) ** 2 * 2 / difference**2))
    while detectable_difference(variance, n, samples, power, confidence) > difference:
        n += 1
    return n
