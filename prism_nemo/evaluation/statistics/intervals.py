"""Intervals and tests for benchmark scores, in plain Python and numpy.

Which one to use:
- one sample per question: `wilson_interval`;
- several samples per question: `clustered_interval`, because samples of one question resemble each other;
- an average of averages (seeds, say): `mean_interval`; of tasks, by domain: `weighted_mean_interval`;
- any other figure of a table of outcomes: `prism_nemo.evaluation.statistics.bootstrap`;
- two models on the same questions: `prism_nemo.evaluation.statistics.differences`, far more sensitive than two
  separate intervals. `intervals_apart` is the cautious reading of two intervals: overlap does not show equality.

All of them describe the sampling of questions, and of answers to them. They say nothing of the variation between
training seeds, and nothing is corrected for choosing the best of many checkpoints on the same test set (see
`prism_nemo.evaluation.comparing.selection`) or for looking at many tasks (`quantiles.holm`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from prism_nemo.evaluation.statistics.quantiles import Interval, normal_quantile, t_quantile, wilson

__all__ = [
    "Interval",
    "clustered_interval",
    "interval_of_means",
    "intervals_apart",
    "majority_at_k",
    "mean_interval",
    "pass_at_k",
    "question_values",
    "weighted_mean_interval",
    "wilson_interval",
]


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
    return wilson(successes / n, n, normal_quantile(confidence))


def numbers_of(values: Sequence[float], what: str) -> np.ndarray:
    """The values as an array [n] in fp64.

    Raises:
        ValueError: None of them, more than one dimension, NaN or Inf; `what` says which values.
    """
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
    array = numbers_of(values, "values")
    if array.size < 2:
        raise ValueError("one value has no spread: at least two are needed")
    mean = float(array.mean())
    half = t_quantile(confidence, array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half)


def checked_questions(correct: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """The outcomes of each question as an array.

    Raises:
        ValueError: No questions, a question without samples, outcomes outside 0 to 1.
    """
    table = _table(correct)
    if table is not None:
        return list(table)
    questions = [numbers_of(outcomes, f"question {i}") for i, outcomes in enumerate(correct)]
    if not questions:
        raise ValueError("no questions (n = 0): an average of nothing has no interval")
    for i, outcomes in enumerate(questions):
        if outcomes.min() < 0 or outcomes.max() > 1:
            raise ValueError(f"question {i}: outcomes must lie in 0 to 1, got {outcomes.min():g} to {outcomes.max():g}")
    return questions


def _table(correct: Sequence[Sequence[float]]) -> np.ndarray | None:
    """[questions, samples] of outcomes that are in order, which needs no look at each question; None for others."""
    if len({len(outcomes) for outcomes in correct}) != 1:
        return None
    table = np.asarray(correct, dtype=np.float64)
    return table if table.ndim == 2 and table.size and table.min() >= 0 and table.max() <= 1 else None


def clustered_interval(correct: Sequence[Sequence[float]], confidence: float = 0.95) -> Interval:
    """Interval for average accuracy when several samples are drawn for each question.

    The standard error is clustered by question (Miller 2024, arXiv 2411.00640): it is that of the question averages, so
    repeating ten questions a hundred times is not taken for a thousand questions. As accuracies may be near 0 or 1,
    where estimate -+ t * error would leave 0 to 1, the error is turned into an effective number of independent samples
    (Kish's design effect, adjusted by t as in Korn and Graubard 1998) and put into Wilson's formula. Where accuracies
    are lopsided, few questions say little of the spread: see `design_effect`.

    How often a nominal 95 % interval holds the truth, in 8,000 simulated benchmarks of 30 questions x 64 samples, by
    how the questions' own accuracies are spread (Beta of mean m and concentration c; "sparse": four of five are 0, the
    others uniform); the percentile bootstrap from 700 of them. The standard error of a share is 0.0024 (0.01):

    | questions          | percentile bootstrap | mean -+ t error | this one |
    |--------------------|----------------------|-----------------|----------|
    | m 0.1, c 1         | 0.89                 | 0.898           | 0.954    |
    | m 0.1, c 0.4       | 0.90                 | 0.900           | 0.949    |
    | sparse             | 0.91                 | 0.908           | 0.961    |
    | m 0.3, c 2         | 0.93                 | 0.945           | 0.954    |
    | m 0.5, c 1         | 0.93                 | 0.949           | 0.959    |
    | m 0.03, c 1        | 0.71                 | 0.748           | 0.972    |
    | m 0.1, c 10        | not measured         | not measured    | 0.990    |

    With 100 questions x 4 samples all of these cases lie between 0.948 and 0.957.

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
    means, samples = question_values(correct), sum(map(len, correct))
    if samples == means.size and np.isin(means, (0, 1)).all():
        return wilson_interval(int(means.sum()), means.size, confidence)
    return interval_of_means(means, samples, confidence)


def design_effect(variance: float, share: float, questions: int) -> float:
    """Variance of question averages as a part of a single sample's, drawn towards 1 where the questions say little.

    The variance of a few averages is hardly known where most are near 0 (or 1) and a rare question is not: a benchmark
    that happens to have none of those looks precise. It is averaged with that of one sample per question, share *
    (1 - share), which is the most it can be; the weight of the latter, in questions, is a quarter of the squared
    skewness of a single sample, (1 - 2 share)^2 / (share (1 - share)): 0 at one half, 1.8 at 0.1, 7.6 at 0.03. The form
    and the quarter are ours, chosen by the simulation in `clustered_interval`.

    Args:
        variance: Of the question averages (n - 1 in the denominator).
        share: Their mean, between 0 and 1 without the ends.
        questions: Number of them, at least 2.
    """
    single = share * (1 - share)
    weight = (1 - 2 * share) ** 2 / (4 * single)
    return ((questions - 1) * variance / single + weight) / (questions - 1 + weight)


def interval_of_means(means: np.ndarray, samples: int, confidence: float = 0.95) -> Interval:
    """`clustered_interval` from the questions' values, which may be any average or estimate within 0 to 1.

    Args:
        means: [n] one for each question.
        samples: Of all questions together: never claimed to say more than as many independent ones.
        confidence: 0.95 for 95 %.
    """
    z, n = normal_quantile(confidence), means.size
    share = min(1.0, max(0.0, float(means.mean())))
    if n < 2 or np.ptp(means) < 1e-12:
        return wilson(share, n, z)
    effective = n / design_effect(float(means.var(ddof=1)), share, n) * (z / t_quantile(confidence, n - 1)) ** 2
    # Negative correlation within questions arises by chance only: never claim more than independent samples would give.
    return wilson(share, min(effective, float(samples)), z)


def intervals_apart(a: Interval, b: Interval) -> bool:
    """Whether two intervals have no point in common; ends that touch do."""
    return a.high < b.low or b.high < a.low


def pass_at_k(correct: Sequence[Sequence[float]], k: int) -> float:
    """The chance that the best of k answers is right, unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Args:
        correct: For each question the outcomes of its samples, 0 or 1. For scores in between it is the expected best
            score of k samples, of which Chen's formula is the case of 0 and 1.
        k: At least 1 and at most the smallest number of samples.

    Returns:
        The mean over questions, 0 to 1.

    Raises:
        ValueError: No questions, outcomes outside 0 to 1, k out of range.
    """
    return float(question_values(correct, f"pass@{k}").mean())


def question_values(correct: Sequence[Sequence[float]], statistic: str = "mean") -> np.ndarray:
    """[n] the statistic of each question: what intervals and paired differences are made of.

    Args:
        correct: For each question the outcomes of its samples.
        statistic: ``mean``, or ``pass@K`` for a whole number K.

    Raises:
        ValueError: No questions, outcomes outside 0 to 1, an unknown statistic, K out of range.
    """
    if statistic == "mean":
        table = _table(correct)
        if table is not None:
            return table.mean(axis=1)
        return np.array([outcomes.mean() for outcomes in checked_questions(correct)])
    questions = checked_questions(correct)
    name, _, number = statistic.partition("@")
    if name != "pass" or not number.lstrip("-").isdigit():
        raise ValueError(f"statistic {statistic!r} is unknown; known: mean, pass@K")
    k, fewest = int(number), min(outcomes.size for outcomes in questions)
    if not 1 <= k <= fewest:
        raise ValueError(f"pass@{k}: k must lie in 1 to {fewest}, the smallest number of samples of a question")
    return np.array([_expected_best(outcomes, k) for outcomes in questions])


def _expected_best(outcomes: np.ndarray, k: int) -> float:
    """Expected maximum of k of the n outcomes, drawn without replacement.

    The i-th smallest is the maximum in C(i-1, k-1) of C(n, k) draws; from the largest down these shares are products of
    factors below 1, so nothing overflows. For 0 and 1 they add up to 1 - C(n - c, k) / C(n, k).
    """
    total, share = 0.0, k / outcomes.size
    for i, value in zip(range(outcomes.size, k - 1, -1), np.sort(outcomes)[::-1], strict=False):
        total += share * value
        share *= (i - k) / (i - 1) if i > 1 else 0.0
    return min(1.0, float(total))


def majority_at_k(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[float]], k: int) -> float:
    """Accuracy of the answer that most of k samples give (self-consistency, Wang et al. 2022, arXiv 2203.11171).

    With more than k samples it is the mean over the consecutive groups of k, a rest left out: every group is a fair
    draw of k samples, and no random number is involved. Of answers with equally many votes one is drawn: the expected
    value is taken. A sample without an answer has no vote; a group without any vote is wrong.

    Args:
        answers: For each question what was read from each sample, or None. Equal texts are one answer, so answers
            should be in a normal form.
        correct: The outcomes of the same samples, 0 to 1.
        k: At least 1 and at most the smallest number of samples.

    Returns:
        The mean over questions, 0 to 1.

    Raises:
        ValueError: No questions, answers and outcomes that do not belong together, k out of range.
    """
    return float(majority_values(answers, correct, k).mean())


def majority_values(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[float]], k: int) -> np.ndarray:
    """[n] `majority_at_k` of each question."""
    questions = checked_questions(correct)
    if len(answers) != len(questions) or any(len(a) != c.size for a, c in zip(answers, questions, strict=True)):
        raise ValueError("answers and outcomes must have the same questions with the same numbers of samples")
    fewest = min(outcomes.size for outcomes in questions)
    if not 1 <= k <= fewest:
        raise ValueError(f"maj@{k}: k must lie in 1 to {fewest}, the smallest number of samples of a question")
    values = []
    for texts, outcomes in zip(answers, questions, strict=True):
        starts = range(0, len(texts) // k * k, k)
        values.append(np.mean([_vote(texts[s : s + k], outcomes[s : s + k]) for s in starts]))
    return np.array(values)


def _vote(texts: Sequence[str | None], outcomes: np.ndarray) -> float:
    """Expected outcome of the answer with most votes; an answer that was judged differently counts as its mean."""
    found: dict[str, list[float]] = {}
    for text, outcome in zip(texts, outcomes, strict=True):
        if text is not None:
            found.setdefault(text, []).append(float(outcome))
    most = max(map(len, found.values()), default=0)
    return float(np.mean([np.mean(votes) for votes in found.values() if len(votes) == most])) if most else 0.0


Groups = Mapping[str, Sequence[Sequence[Sequence[float]]]]
"""Domain -> tasks -> questions -> samples."""


def weighted_mean_interval(groups: Groups, confidence: float = 0.95) -> Interval:
    """Mean of the domains' means, each the mean of its tasks: the study's domain-weighted average.

    With math, code and science (arXiv 2603.17074, footnote 1) a task that is alone in its domain weighs a third. With
    all tasks in one domain it is the plain mean. The tasks' errors are added as those of independent tasks, and the sum
    is put into Wilson's formula as in `clustered_interval`, with degrees of freedom by Satterthwaite (1946).

    Args:
        groups: The outcomes, 0 to 1; the numbers of tasks, questions and samples may all differ.
        confidence: 0.95 for 95 %.

    Returns:
        The average with its interval, within 0 to 1. A task whose questions all have the same average counts with the
        error of Agresti and Coull's share, (x + z^2 / 2) of (n + z^2), of as many single samples as it has questions.

    Raises:
        ValueError: No domains, a domain without tasks, and as in `clustered_interval`.
    """
    if not groups or not all(groups.values()):
        raise ValueError("an average needs at least one domain, and at least one task in each")
    weighted = [
        (1 / len(groups) / len(tasks), question_values(task), sum(map(len, task)))
        for tasks in groups.values()
        for task in tasks
    ]
    if len(weighted) == 1:
        return clustered_interval(next(iter(groups.values()))[0], confidence)
    z = normal_quantile(confidence)
    share = cautious = variance = spread = 0.0
    for weight, means, _ in weighted:
        n, mean = means.size, float(means.mean())
        pulled = (mean * n + z * z / 2) / (n + z * z)
        if n < 2 or np.ptp(means) < 1e-12:
            error_squared = pulled * (1 - pulled) / n
        else:
            error_squared = mean * (1 - mean) * design_effect(float(means.var(ddof=1)), mean, n) / n
        share, cautious = share + weight * mean, cautious + weight * pulled
        variance += weight**2 * error_squared
        spread += (weight**2 * error_squared) ** 2 / max(1, n - 1)
    share = min(1.0, max(0.0, share))
    freedom = max(1, math.floor(variance**2 / spread * (1 + 1e-9)))
    inner = share if 1e-12 < share < 1 - 1e-12 else cautious
    samples = sum(count for _, _, count in weighted)
    effective = inner * (1 - inner) / variance * (z / t_quantile(confidence, freedom)) ** 2
    return wilson(share, min(effective, float(samples)), z)
