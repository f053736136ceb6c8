"""pass@k, maj@k and weighted averages against exact fractions, enumeration and computations by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.evaluation.statistics.intervals import (
    clustered_interval,
    majority_at_k,
    mean_interval,
    pass_at_k,
    question_values,
    weighted_mean_interval,
    wilson_interval,
)
from prism_nemo.evaluation.statistics.quantiles import holm, p_value, t_quantile, wilson

quick = settings(max_examples=60, deadline=None)


@quick
@given(st.integers(1, 70), st.data())
def test_pass_at_k_is_chens_formula(n: int, data: st.DataObject) -> None:
    """1 - C(n - c, k) / C(n, k) in exact fractions; products of up to 70 rounded factors stay within 1e-12."""
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    order = data.draw(st.permutations([1] * c + [0] * (n - c)))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k([order], k) == pytest.approx(float(exact), abs=1e-12)


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.data())
def test_pass_at_k_of_scores_is_the_mean_best_of_all_draws(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    best = [max(draw) for draw in itertools.combinations(scores, k)]
    assert pass_at_k([scores], k) == pytest.approx(sum(best) / len(best), abs=1e-12)


def test_pass_at_k_known_values() -> None:
    assert pass_at_k([[1, 0, 0, 0]], 1) == 0.25
    assert pass_at_k([[1, 0, 0, 0]], 2) == pytest.approx(0.5)
    assert pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], 4) == pytest.approx(0.5)
    assert pass_at_k([[1, 1, 0], [0, 1, 0, 0]], 1) == pytest.approx((2 / 3 + 1 / 4) / 2)
    # 1 - C(1999, 1000) / C(2000, 1000), whose parts are beyond floats.
    assert pass_at_k([[1] + [0] * 1999], 1000) == pytest.approx(0.5)


def test_pass_at_k_is_unbiased() -> None:
    """The mean over draws of 8 samples at p = 0.2 is 1 - 0.8^4: 20,000 draws have a standard error of 0.0017."""
    samples = np.random.default_rng(0).random((20_000, 8)) < 0.2
    assert pass_at_k(samples.astype(float).tolist(), 4) == pytest.approx(1 - 0.8**4, abs=3 * 0.0017)


@pytest.mark.parametrize("k", [0, 3, -1])
def test_pass_at_k_refuses(k: int) -> None:
    with pytest.raises(ValueError, match="k must lie in 1 to 2"):
        pass_at_k([[1, 0, 1], [0, 1]], k)


def test_unknown_statistics_are_refused() -> None:
    for name in ("median", "pass@", "pass@x", "maj@2"):
        with pytest.raises(ValueError, match="unknown"):
            question_values([[1, 0]], name)
    assert question_values([[1, 0], [1, 1]], "mean").tolist() == [0.5, 1.0]
    assert question_values([[1, 0], [1, 1]], "pass@2").tolist() == [1.0, 1.0]


def test_majority_by_hand() -> None:
    right, wrong = 1.0, 0.0
    assert majority_at_k([["4", "5", "4"]], [[right, wrong, right]], 3) == 1.0
    assert majority_at_k([["5", "4", "5"]], [[wrong, right, wrong]], 3) == 0.0
    assert majority_at_k([["4", "5"]], [[right, wrong]], 2) == 0.5  # a tie: either is drawn
    assert majority_at_k([["4", "5", "6"]], [[right, wrong, wrong]], 3) == pytest.approx(1 / 3)
    assert majority_at_k([["4", "4", "5", "5", "6"]], [[right, right, wrong, wrong, wrong]], 5) == 0.5


def test_a_sample_without_an_answer_has_no_vote() -> None:
    assert majority_at_k([[None, None, "4"]], [[0, 0, 1]], 3) == 1.0
    assert majority_at_k([[None, None, None]], [[0, 0, 0]], 3) == 0.0
    assert majority_at_k([[None, None, "4"], ["5", "5", "4"]], [[0, 0, 1], [0, 0, 1]], 3) == 0.5


def test_majority_of_fewer_than_all_samples_takes_whole_groups() -> None:
    answers = ["4", "4", "5", "5", "5", "4", "4"]
    correct = [1, 1, 0, 0, 0, 1, 1]
    assert majority_at_k([answers], [correct], 3) == 0.5  # (4 4 5), (5 5 4), and a rest of one
    assert majority_at_k([answers], [correct], 1) == pytest.approx(4 / 7)
    assert majority_at_k([answers], [correct], 7) == 1.0


def test_majority_refuses_what_does_not_belong_together() -> None:
    for answers, correct in (([["4"]], [[1, 0]]), ([["4"], ["5"]], [[1]])):
        with pytest.raises(ValueError, match="same numbers of samples"):
            majority_at_k(answers, correct, 1)
    with pytest.raises(ValueError, match="k must lie in 1 to 1"):
        majority_at_k([["4"], ["5", "5"]], [[1], [0, 0]], 2)


def test_domain_weights_are_the_studys() -> None:
    """Science alone in its domain weighs a third, each of two code tasks a sixth, each of three maths tasks a ninth."""
    science, code, maths = [[[1]] * 10], [[[1]] * 10, [[0]] * 10], [[[1]] * 10, [[0]] * 10, [[0]] * 10]
    assert weighted_mean_interval({"s": science, "c": code, "m": maths}).estimate == pytest.approx(
        (1 + 1 / 2 + 1 / 3) / 3
    )
    assert weighted_mean_interval({"all": science + code + maths}).estimate == pytest.approx(3 / 6)


def test_a_single_task_has_its_own_interval() -> None:
    correct = [[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert weighted_mean_interval({"math": [correct]}) == clustered_interval(correct)


def test_weighted_error_is_that_of_independent_tasks() -> None:
    """For many questions the interval is estimate -+ 1.96 sqrt(sum w^2 s^2 / n), to 2 % of its width."""
    rng = np.random.default_rng(1)
    tasks = [(rng.random((n, 4)) < rng.beta(2, 2, n)[:, None]).astype(float) for n in (900, 400)]
    groups = {"a": [tasks[0].tolist()], "b": [tasks[1].tolist()]}
    errors = [task.mean(axis=1).var(ddof=1) / len(task) for task in tasks]
    interval = weighted_mean_interval(groups)
    half = 1.959964 * math.sqrt(sum(0.25 * e for e in errors))
    assert interval.estimate == pytest.approx(np.mean([t.mean() for t in tasks]))
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.02)


def test_weighted_without_any_right_answer_is_not_certain() -> None:
    interval = weighted_mean_interval({"a": [[[0]] * 30], "b": [[[0]] * 30]})
    assert (interval.estimate, interval.low) == (0.0, 0.0)
    # Between that of one task of 30 and of 60 questions.
    assert wilson_interval(0, 60).high * 0.9 < interval.high < wilson_interval(0, 30).high * 1.1
    full = weighted_mean_interval({"a": [[[1]] * 30], "b": [[[1]] * 30]})
    assert full.low == pytest.approx(1 - interval.high)


@pytest.mark.parametrize("groups", [{}, {"a": []}, {"a": [[[1]]], "b": []}])
def test_weighted_refuses_empty_domains(groups: dict[str, list[list[list[float]]]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_mean_interval(groups)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2, 0.001]) == pytest.approx([0.2, 0.002])
    assert holm([]) == []


# From published tables of Student's t: 2.042 is the 97.5 % point of 30 degrees of freedom, 3.169 the 99.5 % of 10.
@pytest.mark.parametrize(("t", "freedom", "p"), [(2.0423, 30, 0.05), (-3.1693, 10, 0.01), (12.7062, 1, 0.05)])
def test_p_values_of_published_quantiles(t: float, freedom: int, p: float) -> None:
    assert p_value(t, freedom) == pytest.approx(p, rel=1e-3)
    assert p_value(t_quantile(1 - p, freedom), freedom) == pytest.approx(p, rel=1e-9)


def test_p_value_does_not_jump_where_the_method_changes() -> None:
    assert p_value(2.0, 10_001) == pytest.approx(p_value(2.0, 10_000), rel=1e-3)


def test_wilson_of_fractional_numbers_is_between_whole_ones() -> None:
    z = 1.959964
    assert wilson(0.25, 8, z).high > wilson(0.25, 9.5, z).high > wilson(0.25, 12, z).high
    assert mean_interval([0.25, 0.25]).low == 0.25
