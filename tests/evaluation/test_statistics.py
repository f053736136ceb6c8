"""Intervals and tests against published values, slow direct computations and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.evaluation.statistics.intervals import (
    Interval,
    clustered_interval,
    intervals_apart,
    mean_interval,
    wilson_interval,
)

quick = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 256, 0.0, 1.5),  # rows of the pocket recipe, in percent
        (2, 256, 0.2, 2.8),
        (19, 256, 4.8, 11.3),
        (116, 256, 39.3, 51.4),
        (479, 1000, 44.8, 51.0),
        (256, 256, 98.5, 100.0),
    ],
)
def test_wilson_known_values(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, n)
    assert (round(100 * interval.low, 1), round(100 * interval.high, 1)) == (low, high)
    assert interval.estimate == successes / n


@quick
@given(st.data(), st.integers(1, 5000), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_ends_solve_the_score_equation(data: st.DataObject, n: int, confidence: float) -> None:
    k = data.draw(st.integers(0, n))
    interval, mirror = wilson_interval(k, n, confidence), wilson_interval(n - k, n, confidence)
    assert 0 <= interval.low <= k / n <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirror.high, abs=1e-12)
    z = {0.5: 0.6744897502, 0.9: 1.6448536270, 0.95: 1.9599639845, 0.999: 3.2905267315}[confidence]
    for end in (interval.low, interval.high):  # (p - end)^2 = z^2 end (1 - end) / n defines the interval
        assert (k / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, rel=1e-6, abs=1e-12)


def test_wilson_exact_ends() -> None:
    assert wilson_interval(0, 7).low == 0.0
    assert wilson_interval(7, 7).high == 1.0


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="n = 0" if n == 0 else "0 to 5"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_confidence_is_a_share(confidence: float) -> None:
    for call in (
        lambda: wilson_interval(1, 2, confidence),
        lambda: mean_interval([0, 1], confidence),
        lambda: clustered_interval([[0, 1], [1, 1]], confidence),
    ):
        with pytest.raises(ValueError, match="confidence"):
            call()


# Two-sided 95 % quantiles of Student's t from published tables (201 is past the switch to the expansion).
@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.30265), (5, 2.57058), (10, 2.22814), (29, 2.04523), (120, 1.97993), (1000, 1.96234)],
)
def test_mean_interval_uses_student_t(freedom: int, t: float) -> None:
    values = np.random.default_rng(freedom).normal(3, 2, size=freedom + 1)
    interval = mean_interval(values.tolist())
    error = values.std(ddof=1) / math.sqrt(freedom + 1)
    assert interval.estimate == pytest.approx(values.mean())
    assert (interval.high - interval.estimate) / error == pytest.approx(t, rel=3e-6)
    assert (interval.estimate - interval.low) / error == pytest.approx(t, rel=3e-6)


def test_t_is_continuous_where_the_method_changes() -> None:
    halves = []
    for n in (200, 201, 202, 203):  # freedom 199 to 202; the expansion starts at 201
        values = [1.0, -1.0] * (n // 2) + [0.0] * (n % 2)
        halves.append(mean_interval(values, 0.99).high * math.sqrt(n) / np.std(values, ddof=1))
    steps = np.diff(halves)
    assert steps[1] == pytest.approx((steps[0] + steps[2]) / 2, rel=1e-3)


def test_mean_interval_by_hand_and_refusals() -> None:
    interval = mean_interval([1, 2, 3])
    assert interval.estimate == 2
    assert interval.high == pytest.approx(2 + 4.30265 / math.sqrt(3), rel=1e-5)
    assert mean_interval([4, 4, 4]) == Interval(4, 4, 4)
    for bad in ([], [1], [1, math.nan], [[1, 2], [3, 4]]):
        with pytest.raises(ValueError, match=r"values|two"):
            mean_interval(bad)  # type: ignore[arg-type]


@quick
@given(st.lists(st.integers(0, 1), min_size=1, max_size=200))
def test_clustered_with_one_sample_each_is_wilson(outcomes: list[int]) -> None:
    assert clustered_interval([[x] for x in outcomes]) == wilson_interval(sum(outcomes), len(outcomes))


def test_clustered_by_hand() -> None:
    correct = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]  # question averages 1, 0, 1/4, 3/4
    error_squared = (0.25 + 0.25 + 0.0625 + 0.0625) / 3 / 4
    effective = 0.25 / error_squared * (1.9599640 / 3.1824463) ** 2  # t for 3 degrees of freedom
    z2 = 1.9599640**2
    half = math.sqrt(z2) / (1 + z2 / effective) * math.sqrt(0.25 / effective + z2 / (4 * effective**2))
    interval = clustered_interval(correct)
    assert interval.estimate == 0.5
    assert interval.high == pytest.approx(0.5 + half, rel=1e-6)
    assert interval.low == pytest.approx(0.5 - half, rel=1e-6)


def test_copies_of_one_sample_add_no_information() -> None:
    outcomes = [1, 0, 0, 1, 1, 0, 1, 1, 1, 0] * 20
    copied = clustered_interval([[x] * 8 for x in outcomes])
    single = wilson_interval(sum(outcomes), len(outcomes))
    assert copied.high - copied.low == pytest.approx(single.high - single.low, rel=0.02)
    naive = wilson_interval(8 * sum(outcomes), 8 * len(outcomes))
    assert copied.high - copied.low > 2.5 * (naive.high - naive.low)


def test_many_questions_agree_with_the_plain_t_interval() -> None:
    rng = np.random.default_rng(1)
    correct = [rng.binomial(1, p, size=4).tolist() for p in rng.beta(2, 2, size=2000)]
    ours, plain = clustered_interval(correct), mean_interval([float(np.mean(x)) for x in correct])
    assert ours.low == pytest.approx(plain.low, abs=2e-4)
    assert ours.high == pytest.approx(plain.high, abs=2e-4)


def test_clustered_without_spread_counts_questions() -> None:
    assert clustered_interval([[0] * 8] * 256) == wilson_interval(0, 256)
    assert clustered_interval([[1, 1], [1], [1, 1, 1]]) == wilson_interval(3, 3)
    assert clustered_interval([[1, 0]] * 10) == wilson_interval(5, 10)
    assert clustered_interval([[1, 0]]).high - clustered_interval([[1, 0]]).low > 0.8  # one question says very little


def test_clustered_never_claims_more_than_independent_samples() -> None:
    correct = [[1, 0, 1, 0]] * 50 + [[1, 1, 1, 0]]  # almost no spread between questions
    independent = wilson_interval(103, 204)
    ours = clustered_interval(correct)
    assert ours.high - ours.low == pytest.approx(independent.high - independent.low, rel=1e-3)


def test_clustered_coverage_near_zero() -> None:
    """Nominal 95 % at an accuracy of 2 %, where estimate -+ 1.96 errors covers far less."""
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(400):
        p = rng.beta(0.2, 9.8, size=100)  # mean 0.02, strongly alike samples
        interval = clustered_interval(rng.binomial(1, p[:, None], size=(100, 4)).tolist())
        inside += interval.low <= 0.02 <= interval.high
    assert inside >= 0.92 * 400


def test_questions_weigh_the_same_whatever_their_samples() -> None:
    assert clustered_interval([[1], [0, 0, 0], [1, 0]]).estimate == 0.5
    assert clustered_interval([[0.25], [0.75], [0.5]]).estimate == 0.5  # scores between 0 and 1


@pytest.mark.parametrize("bad", [[], [[]], [[1, 0], []], [[1, 2]], [[0, -1]], [[0.5, math.nan]]])
def test_clustered_refuses(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="question" if bad else "an average of nothing"):
        clustered_interval(bad)


def test_intervals_apart() -> None:
    low, high, touching = Interval(1, 0, 2), Interval(4, 3, 5), Interval(2.5, 2, 3)
    assert intervals_apart(low, high)
    assert intervals_apart(high, low)
    assert not intervals_apart(low, touching)
    assert not intervals_apart(touching, low)
    assert not intervals_apart(Interval(1, 0, 9), high)
    assert not intervals_apart(high, Interval(1, 0, 9))
