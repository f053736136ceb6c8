"""Two models on the same questions: paired differences with intervals and tests, in plain Python and numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prism_nemo.evaluation.statistics.intervals import numbers_of
from prism_nemo.evaluation.statistics.quantiles import Interval, normal_quantile, p_value, t_quantile, wilson


@dataclass(frozen=True)
class Difference(Interval):
    """A difference with its interval and its test.

    Attributes:
        error: Standard error.
        freedom: Degrees of freedom of Student's t, of which the interval and the p-value are made.
        p_value: Two-sided, that there is no difference: below 0.05 exactly where the 95 % interval leaves 0 out.
    """

    error: float
    freedom: int
    p_value: float


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = numbers_of(a, "a"), numbers_of(b, "b")
    if first.size != second.size:
        raise ValueError(
            f"a has {first.size} questions, b has {second.size}; both need the same ones in the same order"
        )
    for name, values in (("a", first), ("b", second)):
        if values.min() < 0 or values.max() > 1:
            raise ValueError(f"{name}: outcomes must lie in 0 to 1, got {values.min():g} to {values.max():g}")
    return first, second


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """How much better b does than a on the same questions, with Student's t on the questions' differences.

    Where only a few questions differ, and all the same way, their spread is hardly known, and the plain t interval (and
    the percentile bootstrap) claims too much. So half a question is added that differs by as much as the differing ones
    and half a question the other way, as Agresti and Min (2005) and Bonett and Price (2012) add whole ones to a table
    of 0 and 1; "as much" is the size sqrt(sum d^4 / sum d^2), which is 1 for 0 and 1, and small for averages that
    differ by noise alone.

    How often a nominal 95 % interval holds the truth, in 8,000 simulated pairs of models (standard error 0.0024):

    | questions                                         | n   | plain t | this one |
    |---------------------------------------------------|-----|---------|----------|
    | 1 sample, 6 % worse and 2 % better                | 30  | 0.842   | 0.996    |
    |                                                   | 100 | 0.937   | 0.958    |
    |                                                   | 500 | 0.947   | 0.951    |
    | 1 sample, 5 % worse, none better                  | 100 | 0.874   | 0.957    |
    | 1 sample, 20 % worse and 10 % better              | 30  | 0.956   | 0.963    |
    | 16 samples, each 3 points less likely right       | 30  | 0.951   | 0.964    |
    | 64 samples, 5 % of the questions lost altogether  | 30  | 0.870   | 0.881    |
    |                                                   | 100 | 0.892   | 0.900    |
    |                                                   | 500 | 0.944   | 0.950    |

    The last case is beyond any interval made of the data alone: of so few questions often none was among those lost.

    Args:
        a: outcome per question of one model, 0 or 1, or the average of its samples.
        b: the same of the other model, in the same order.
        confidence: 0.95 for 95 %.

    Returns:
        mean(b) - mean(a), within -1 to 1, with its interval. Where all questions differ by the same amount a width of 0
        would claim certainty; there the interval allows for the share of different questions that Wilson's interval
        leaves open after n questions without one.

    Raises:
        ValueError: no questions, numbers of questions differ, outcomes outside 0 to 1, confidence outside 0 to 1.
    """
    first, second = _paired(a, b)
    return weighted_difference([second - first], [1.0], confidence)


def weighted_difference(
    differences: Sequence[np.ndarray], weights: Sequence[float], confidence: float = 0.95
) -> Difference:
    """`paired_difference` of a weighted average of tasks.

    Args:
        differences: For each task [n] the second model's outcomes minus the first's, by question.
        weights: Of the tasks; their sum is 1.
        confidence: 0.95 for 95 %.

    Returns:
        The weighted difference. Degrees of freedom by Satterthwaite (1946), rounded down.
    """
    z = normal_quantile(confidence)
    estimate = centre = variance = spread = 0.0
    for values, weight in zip(differences, weights, strict=True):
        mean, middle, error_squared = float(values.mean()), *_smoothed(values, z)
        estimate += weight * mean
        centre += weight * middle
        variance += weight**2 * error_squared
        spread += (weight**2 * error_squared) ** 2 / max(1, values.size - 1)
    freedom = max(1, math.floor(variance**2 / spread * (1 + 1e-9)))
    error = math.sqrt(variance)
    half = t_quantile(confidence, freedom) * error
    low, high = max(-1.0, min(centre - half, estimate)), min(1.0, max(centre + half, estimate))
    return Difference(estimate, low, high, error, freedom, p_value(centre / error, freedom))


def _smoothed(values: np.ndarray, z: float) -> tuple[float, float]:
    """Mean and squared standard error of it, with the half questions of `paired_difference` added."""
    n = values.size
    if np.ptp(values) < 1e-12:  # equal but for the rounding of averages
        unseen = wilson(0.0, n, z).high
        return (1 - unseen) * float(values.mean()), (unseen / t_quantile(_confidence(z), max(1, n - 1))) ** 2
    squares = values**2
    added = float((squares**2).sum() / squares.sum())
    mean = float(values.sum()) / (n + 1)
    return mean, ((float(squares.sum()) + added) / (n + 1) - mean**2) / (n + 1)


def _confidence(z: float) -> float:
    """What `normal_quantile` was asked for."""
    return math.erf(z / math.sqrt(2))


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


PairedGroups = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]
"""Domain -> tasks -> the first and the second model's outcomes by question."""


def domain_difference(groups: PairedGroups, confidence: float = 0.95) -> Difference:
    """How much better the second model's domain-weighted average is; the pair of `weighted_mean_interval`.

    Args:
        groups: Outcomes of both models on the same questions in the same order, 0 to 1; a question with several samples
            by its average, or by its pass@k (`statistics.question_values`).
        confidence: 0.95 for 95 %.

    Raises:
        ValueError: No domains, a domain without tasks, and as in `paired_difference`.
    """
    if not groups or not all(groups.values()):
        raise ValueError("an average needs at least one domain, and at least one task in each")
    differences, weights = [], []
    for tasks in groups.values():
        for a, b in tasks:
            first, second = _paired(a, b)
            differences.append(second - first)
            weights.append(1 / len(groups) / len(tasks))
    return weighted_difference(differences, weights, confidence)


def token_mean(values: Sequence[float], tokens: Sequence[float], confidence: float = 0.95) -> Difference:
    """Mean over tokens of values that are known by row, such as losses or differences of losses of two models.

    The ratio estimator of survey sampling (Cochran 1977, section 2.11), with Student's t: rows are independent, the
    tokens within a row need not be.

    Args:
        values: For each row the mean over its tokens; of any size and sign.
        tokens: Of each row, at least 1.
        confidence: 0.95 for 95 %.

    Returns:
        sum(tokens * values) / sum(tokens) with its interval; the test is against 0.

    Raises:
        ValueError: Fewer than two rows, lengths that differ, a row without tokens, NaN or Inf.
    """
    array, sizes = numbers_of(values, "values"), numbers_of(tokens, "tokens")
    if array.size != sizes.size or array.size < 2 or sizes.min() < 1:
        raise ValueError("token_mean needs at least two rows, each with its value and at least one token")
    n, mean = array.size, float((array * sizes).sum() / sizes.sum())
    off = (array - mean) * sizes / sizes.mean()
    error = math.sqrt(float((off**2).sum()) / (n - 1) / n)
    half = t_quantile(confidence, n - 1) * error
    p = p_value(mean / error, n - 1) if error > 0 else float(mean == 0)
    return Difference(mean, mean - half, mean + half, error, n - 1, p)
