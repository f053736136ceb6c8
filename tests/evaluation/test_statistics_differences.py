"""Paired differences: by hand, against plain Student's t where that is right, and exact tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.evaluation.statistics.differences import (
    domain_difference,
    mcnemar_exact,
    paired_difference,
    token_mean,
    weighted_difference,
)
from prism_nemo.evaluation.statistics.intervals import intervals_apart, mean_interval, question_values, wilson_interval
from prism_nemo.evaluation.statistics.quantiles import t_quantile

quick = settings(max_examples=60, deadline=None)


def test_paired_difference_by_hand() -> None:
    """Differences 1, 0, 0, -1, 1, and half a question of 1 and of -1: six questions with sum 1 and squares 4."""
    found = paired_difference([0, 0, 1, 1, 0], [1, 0, 1, 0, 1])
    error = math.sqrt((4 / 6 - (1 / 6) ** 2) / 6)
    assert found.estimate == pytest.approx(0.2)
    assert (found.error, found.freedom) == (pytest.approx(error), 4)
    assert found.low == pytest.approx(1 / 6 - t_quantile(0.95, 4) * error)
    assert found.high == 1.0  # it would be 1.07
    assert found.p_value > 0.05


def test_paired_difference_is_paired_and_signed() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, size=400)
    b = np.where(rng.random(400) < 0.05, 1, a)  # better on a few questions, equal on the rest
    interval = paired_difference(a.tolist(), b.tolist())
    assert interval.low > 0  # unpaired intervals overlap here
    assert interval.p_value < 0.05
    assert not intervals_apart(wilson_interval(int(a.sum()), 400), wilson_interval(int(b.sum()), 400))
    reverse = paired_difference(b.tolist(), a.tolist())
    assert (reverse.low, reverse.high) == (pytest.approx(-interval.high), pytest.approx(-interval.low))
    shuffled = paired_difference(a.tolist(), rng.permutation(b).tolist())
    assert shuffled.high - shuffled.low > 2 * (interval.high - interval.low)


def test_many_averages_agree_with_plain_t() -> None:
    """The added question is one of 2,000; with normal differences its size is sqrt(3) times theirs: a width up by
    (3 / 2000 - 1 / 2000) / 2, and a centre of 1 / 2001 less."""
    rng = np.random.default_rng(5)
    a = np.clip(rng.normal(0.5, 0.1, 2000), 0, 1)
    b = np.clip(a + rng.normal(0.02, 0.05, 2000), 0, 1)
    ours, plain = paired_difference(a.tolist(), b.tolist()), mean_interval((b - a).tolist())
    assert ours.high - ours.low == pytest.approx(plain.high - plain.low, rel=2e-3)
    assert ours.low == pytest.approx(plain.low, abs=2e-5)


def test_pass_at_k_is_compared_question_by_question() -> None:
    a, b = [[1, 0, 0, 0], [0, 0, 0, 0]] * 20, [[1, 1, 0, 0], [0, 0, 1, 0]] * 20
    values = [question_values(model, "pass@2").tolist() for model in (a, b)]
    assert paired_difference(*values).estimate == pytest.approx(((5 / 6 - 1 / 2) + 1 / 2) / 2)


def test_domain_difference_weighs_domains_then_tasks() -> None:
    worse, same = ([1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]), ([1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0])
    found = domain_difference({"math": [worse, same], "science": [same]})
    assert found.estimate == pytest.approx(-0.25 / 4)
    alone = domain_difference({"math": [worse]})
    assert alone == paired_difference(*worse)
    for groups in ({}, {"math": []}):
        with pytest.raises(ValueError, match="at least one"):
            domain_difference(groups)


def test_weighted_difference_adds_variances() -> None:
    rng = np.random.default_rng(2)
    tasks = [rng.choice([-1.0, 0.0, 1.0], size=n) for n in (50, 80)]
    found, parts = weighted_difference(tasks, [0.25, 0.75]), [weighted_difference([task], [1.0]) for task in tasks]
    assert found.error == pytest.approx(math.hypot(0.25 * parts[0].error, 0.75 * parts[1].error))
    assert 49 <= found.freedom <= 49 + 79


def test_token_mean_weighs_tokens() -> None:
    found = token_mean([1.0, 3.0], [30, 10])
    assert found.estimate == pytest.approx(1.5)
    even = token_mean([1.0, 2.0, 4.0], [8, 8, 8])
    plain = mean_interval([1.0, 2.0, 4.0])
    assert (even.low, even.high) == (pytest.approx(plain.low), pytest.approx(plain.high))
    assert token_mean([0.0, 0.0], [1, 1]).p_value == 1.0
    assert token_mean([0.5, 0.5], [1, 1]).p_value == 0.0
    for values, tokens in (([1.0], [1]), ([1.0, 2.0], [1]), ([1.0, 2.0], [0, 1])):
        with pytest.raises(ValueError, match="two rows"):
            token_mean(values, tokens)


def test_paired_difference_without_variation_is_not_certain() -> None:
    same = paired_difference([0, 1] * 128, [0, 1] * 128)
    assert (same.estimate, same.low, same.high) == (
        0,
        pytest.approx(-0.0148, abs=1e-4),
        pytest.approx(0.0148, abs=1e-4),
    )
    shifted = paired_difference([0] * 256, [1] * 256)
    assert (shifted.estimate, shifted.high) == (1, pytest.approx(1))
    assert shifted.low == pytest.approx(1 - 2 * 0.0147839, abs=1e-6)
    rounded = paired_difference([0.1, 0.2, 0.3], [0.3, 0.4, 0.5])
    assert rounded.high - rounded.low > 0.5


@quick
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_mcnemar_is_the_binomial_tail(only_a: int, only_b: int, both: int) -> None:
    a = [1] * only_a + [0] * only_b + [1] * both + [0]
    b = [0] * only_a + [1] * only_b + [1] * both + [0]
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    assert mcnemar_exact(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar_exact(a, b) == mcnemar_exact(b, a)


def test_mcnemar_known_values() -> None:
    assert mcnemar_exact([1, 0, 1], [1, 0, 1]) == 1.0
    assert mcnemar_exact([0] * 6, [1] * 6) == 2 / 64
    assert mcnemar_exact([1] + [0] * 9, [0] + [1] * 9) == 22 / 1024
    assert 0 <= mcnemar_exact([0] * 3000, [1] * 3000) < 1e-300  # beyond the range of floats: no overflow


@pytest.mark.parametrize("function", [paired_difference, mcnemar_exact])
def test_paired_functions_refuse(function) -> None:
    for a, b, match in (
        ([], [], "non-empty"),
        ([1, 0], [1], "2 questions"),
        ([0, 2], [0, 1], "a: outcomes"),
        ([0, 1], [0, -1], "b: outcomes"),
        ([math.nan], [1], "NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            function(a, b)
    for a, b in (([0.5], [1]), ([1], [0.5])):
        with pytest.raises(ValueError, match="0 or 1"):
            mcnemar_exact(a, b)
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="confidence"):
            paired_difference([0, 1], [1, 1], confidence)
