"""The bootstrap against the formula that it has to agree with, and against all resamples of a small table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prism_nemo.evaluation.statistics.bootstrap import clustered_bootstrap, resampled_means
from prism_nemo.evaluation.statistics.intervals import (
    clustered_interval,
    interval_of_means,
    question_values,
    wilson_interval,
)
from prism_nemo.evaluation.statistics.quantiles import Interval


def _outcomes(seed: int, questions: int = 60, samples: int = 8) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    accuracies = rng.beta(0.4, 1.2, size=questions)
    return (rng.random((questions, samples)) < accuracies[:, None]).astype(float).tolist()


def test_mean_and_pass_at_k_are_the_formula_but_for_the_chance_of_draws() -> None:
    """The error of 20,000 draws has a relative error of 1 / sqrt(40,000) = 0.5 %: three times that."""
    correct = _outcomes(1)
    found, exact = clustered_bootstrap(correct, resamples=20_000), clustered_interval(correct)
    assert found.estimate == pytest.approx(exact.estimate)
    assert found.high - found.low == pytest.approx(exact.high - exact.low, rel=0.015)
    best = clustered_bootstrap(correct, "pass@4", resamples=20_000)
    expected = interval_of_means(question_values(correct, "pass@4"), 60 * 8)
    assert best.estimate == pytest.approx(expected.estimate)
    assert best.high - best.low == pytest.approx(expected.high - expected.low, rel=0.015)
    assert best.estimate > found.estimate


def test_questions_are_drawn_and_not_samples() -> None:
    """Copies of one sample say no more than the sample; the width does not shrink with their number."""
    once = [[x] for x in [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0] * 5]
    copied = clustered_bootstrap([x * 16 for x in once])
    single = clustered_bootstrap([x * 2 for x in once])
    assert copied.high - copied.low == pytest.approx(single.high - single.low, rel=0.02)
    naive = wilson_interval(25 * 16, 50 * 16)
    assert copied.high - copied.low > 3 * (naive.high - naive.low)


def test_any_function_of_the_questions() -> None:
    """The mean as a function is the mean by name: the same draws, so the same interval."""
    correct = _outcomes(2, questions=30)
    by_name = clustered_bootstrap(correct, "mean", resamples=400, seed=3)
    found = clustered_bootstrap(correct, lambda qs: float(np.mean([q.mean() for q in qs])), resamples=400, seed=3)
    assert (found.low, found.high) == (pytest.approx(by_name.low), pytest.approx(by_name.high))
    solved = clustered_bootstrap(correct, lambda qs: float(np.mean([q.max() for q in qs])), resamples=400)
    assert solved.estimate == pytest.approx(question_values(correct, "pass@8").mean())
    with pytest.raises(ValueError, match="0 to 1"):
        clustered_bootstrap(correct, lambda qs: 100 * float(qs[0].mean()), resamples=100)


def test_seeds_decide_the_draws() -> None:
    correct = _outcomes(4)
    first = clustered_bootstrap(correct, resamples=200, seed=1)
    assert first == clustered_bootstrap(correct, resamples=200, seed=1)
    assert first != clustered_bootstrap(correct, resamples=200, seed=2)


def test_without_variation_the_number_of_questions_counts() -> None:
    assert clustered_bootstrap([[0, 0]] * 40) == wilson_interval(0, 40)
    assert clustered_bootstrap([[1]]) == wilson_interval(1, 1)
    assert clustered_bootstrap([[1, 0]] * 40) == Interval(0.5, *_ends(20, 40))


def _ends(successes: int, n: int) -> tuple[float, float]:
    interval = wilson_interval(successes, n)
    return interval.low, interval.high


def test_resampled_means_are_those_of_all_draws() -> None:
    """Of 4 questions there are 256 draws; the mean and variance of 40,000 of them, within 3 standard errors."""
    values = np.array([0.0, 0.25, 1.0, 0.5])
    every = np.array([np.mean(draw) for draw in itertools.product(values, repeat=4)])
    drawn = resampled_means(values, 40_000, seed=0)
    assert drawn.shape == (40_000,)
    assert drawn.mean() == pytest.approx(every.mean(), abs=3 * every.std() / 200)
    assert drawn.var() == pytest.approx(every.var(), rel=3 * np.sqrt(2 / 40_000))


def test_models_share_their_draws() -> None:
    values = np.random.default_rng(0).random((50, 1))
    drawn = resampled_means(np.hstack([values, values + 0.25]), 300, seed=0)
    assert drawn.shape == (300, 2)
    assert drawn[:, 1] - drawn[:, 0] == pytest.approx(0.25)
    assert drawn[:, 0].std() > 0.01


def test_blocks_give_as_many_as_asked_for() -> None:
    values = np.arange(9000.0)  # 116 draws to a block
    assert resampled_means(values, 250, seed=0).shape == (250,)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 100"):
        clustered_bootstrap([[1, 0]], resamples=99)
    with pytest.raises(ValueError, match="no questions"):
        clustered_bootstrap([])
    with pytest.raises(ValueError, match="nothing to draw"):
        resampled_means(np.zeros(0), 100, 0)
    with pytest.raises(ValueError, match="confidence"):
        clustered_bootstrap([[1, 0]], confidence=95)
