"""The smallest difference that a benchmark sees, against simulated benchmarks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prism_nemo.evaluation.statistics.differences import paired_difference
from prism_nemo.evaluation.statistics.power import (
    Variance,
    detectable,
    detectable_difference,
    questions_needed,
    standard_error,
    variance_of,
)


def _pair(rng: np.random.Generator, questions: int, samples: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of two models; the second is better by `shift` on average, more on some questions than on others."""
    p = rng.uniform(0.3, 0.6, size=questions)
    q = p + shift + rng.uniform(-0.1, 0.1, size=questions)
    return tuple((rng.random((questions, samples)) < x[:, None]).astype(float) for x in (p, q))  # type: ignore[return-value]


def _true_variance(shift: float) -> Variance:
    """Of `_pair`: p is uniform with mean 0.45 and variance 0.09 / 12, the change of it with variance 0.04 / 12."""
    p, spread, change = 0.45, 0.3**2 / 12, 0.2**2 / 12
    first = p * (1 - p) - spread
    q = p + shift
    return Variance(change, first + q * (1 - q) - spread - change)


@pytest.mark.parametrize(("questions", "samples"), [(60, 4), (200, 1), (40, 16)])
def test_the_difference_is_found_in_eight_of_ten_cases(questions: int, samples: int) -> None:
    """2,000 simulated pairs: three standard errors are 0.027, and one point for the approximation."""
    rng, runs = np.random.default_rng(7), 2000
    difference = detectable_difference(_true_variance(0.1), questions, samples)
    found = 0
    for _ in range(runs):
        a, b = _pair(rng, questions, samples, difference)
        interval = paired_difference(a.mean(axis=1).tolist(), b.mean(axis=1).tolist())
        found += interval.low > 0
    # The variance at the difference itself is a little another one than at 0.1: by less than 2 %.
    assert found / runs == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / runs) + 0.02)


def test_variance_parts_are_estimated_without_bias() -> None:
    """Means over 400 pairs of 100 questions x 3 samples, within four of their standard errors."""
    rng = np.random.default_rng(8)
    found = [variance_of(*(x.tolist() for x in _pair(rng, 100, 3, 0.1))) for _ in range(400)]
    truth = _true_variance(0.1)
    within = np.array([v.within for v in found])
    assert within.mean() == pytest.approx(truth.within, abs=4 * within.std() / 20)
    # Cut at 0, so the mean is a little high; without the noise of sampling taken off it would be 0.16.
    between = np.array([v.between for v in found])
    assert truth.between <= between.mean() < 0.03


def test_standard_error_by_hand() -> None:
    assert standard_error(Variance(0.04, 0.3), 100, 3) == pytest.approx(math.sqrt((0.04 + 0.1) / 100))
    assert detectable(0.01, 10**6) == pytest.approx(0.01 * (1.959964 + 0.841621), rel=1e-5)
    assert detectable(0.01, 10**6, power=0.9) == pytest.approx(0.01 * (1.959964 + 1.281552), rel=1e-5)


def test_samples_help_only_where_sampling_is_the_noise() -> None:
    noise, flips = Variance(0.0, 0.4), Variance(0.1, 0.0)
    assert detectable_difference(noise, 30, 64) == pytest.approx(detectable_difference(noise, 30, 1) / 8)
    assert detectable_difference(flips, 30, 64) == detectable_difference(flips, 30, 1)


@pytest.mark.parametrize("difference", [0.01, 0.05, 0.3])
def test_questions_needed_are_the_fewest(difference: float) -> None:
    variance = Variance(0.05, 0.3)
    n = questions_needed(variance, difference, samples=2)
    assert detectable_difference(variance, n, 2) <= difference
    assert n == 2 or detectable_difference(variance, n - 1, 2) > difference


def test_gpqa_sees_several_points() -> None:
    """198 questions x 3 samples with moderate sampling noise and one question in ten changed: about 8 points."""
    assert 0.07 < detectable_difference(Variance(0.1, 0.3), 198, 3) < 0.1


def test_refusals() -> None:
    for n, k in ((1, 1), (10, 0)):
        with pytest.raises(ValueError, match="at least 2 x 1"):
            standard_error(Variance(0.1, 0.1), n, k)
    with pytest.raises(ValueError, match="negative"):
        standard_error(Variance(-0.1, 0.1), 10, 1)
    for power in (0.5, 1.0):
        with pytest.raises(ValueError, match="power"):
            detectable(0.1, 10, power)
    with pytest.raises(ValueError, match="above 0"):
        questions_needed(Variance(0.1, 0.1), 0.0)
    with pytest.raises(ValueError, match="at least two"):
        variance_of([[1], [0]], [[1], [0]])
    with pytest.raises(ValueError, match="same of both"):
        variance_of([[1, 0], [0, 0]], [[1, 0]])
