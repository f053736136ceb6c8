"""From results of questions to scores: ours with an interval, and the number that a leaderboard would print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prism_nemo.evaluation.harness.tasks.samples import options_of
from prism_nemo.evaluation.harness.tasks.table import Benchmark
from prism_nemo.evaluation.result import QuestionResult, TaskScore
from prism_nemo.evaluation.statistics.intervals import Interval, clustered_interval, mean_interval

_INSTRUCTIONS = "inst_level_strict_acc"


def task_score(benchmark: Benchmark, leaves: Mapping[str, list[QuestionResult]], shots: int) -> TaskScore:
    """Score of a benchmark.

    Args:
        benchmark: The benchmark.
        leaves: Results of every question of every task of it.
        shots: Examples before each question.

    Returns:
        The mean over questions with its interval; in `details` the tasks' own means and the leaderboard's score (0 to
        100, with an interval).
    """
    questions = counted_questions(benchmark, leaves)
    interval = clustered_interval([[result.correct] for result in questions])
    details: dict[str, object] = {"shots": shots, "filter": benchmark.filter}
    if len(leaves) > 1:
        details["subtasks"] = {name: _mean([r.correct for r in results]) for name, results in leaves.items()}
    if benchmark.board:
        board = board_score(benchmark, leaves)
        details["leaderboard"] = {
            "version": benchmark.board,
            "score": board.estimate,
            "low": board.low,
            "high": board.high,
        }
    return TaskScore(
        domain=benchmark.domain,
        metric=benchmark.metric,
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        questions=len(questions),
        chance=chance_of(benchmark, leaves),
        details=details,
    )


def counted_questions(benchmark: Benchmark, leaves: Mapping[str, list[QuestionResult]]) -> list[QuestionResult]:
    """The questions that make the estimate, each once."""
    names = benchmark.counted or tuple(leaves)
    return [result for name in names for result in leaves[name]]


def chance_of(benchmark: Benchmark, leaves: Mapping[str, list[QuestionResult]]) -> float | None:
    """What guessing scores on the questions that count; None where it is not known."""
    values = [_chance(benchmark, name, leaves[name]) for name in benchmark.counted or tuple(leaves)]
    sizes = [len(leaves[name]) for name in benchmark.counted or tuple(leaves)]
    if any(value is None for value in values):
        return None
    return sum(float(value or 0.0) * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _chance(benchmark: Benchmark, leaf: str, results: Sequence[QuestionResult]) -> float | None:
    """What guessing scores on one task."""
    if leaf in benchmark.subtask_chance:
        return benchmark.subtask_chance[leaf]
    if benchmark.chance == "options":
        return _mean([1 / options_of(result) for result in results])
    return benchmark.chance


def board_score(benchmark: Benchmark, leaves: Mapping[str, list[QuestionResult]]) -> Interval:
    """The leaderboard's score, 0 to 100; see `prism_nemo.evaluation.harness.tasks.table`.

    The interval follows the same rule at both ends. Where a score is the mean over tasks, their intervals are joined by
    the rule of Zou and Donner (2008, "MOVER"): for a sum of independent estimates, squared distances to the ends add.
    """
    if benchmark.by_subtask:
        return averaged([_normalised(benchmark, name, results) for name, results in leaves.items()])
    return _normalised(benchmark, next(iter(leaves)), [result for results in leaves.values() for result in results])


def averaged(parts: Sequence[Interval]) -> Interval:
    """The mean of independent estimates, joined by MOVER."""
    estimate = _mean([part.estimate for part in parts])
    below = math.sqrt(math.fsum((part.estimate - part.low) ** 2 for part in parts)) / len(parts)
    above = math.sqrt(math.fsum((part.high - part.estimate) ** 2 for part in parts)) / len(parts)
    return Interval(estimate, estimate - below, estimate + above)


def _normalised(benchmark: Benchmark, leaf: str, results: Sequence[QuestionResult]) -> Interval:
    """One task's score on the leaderboard's scale."""
    raw = _interval([_board_value(benchmark, result, results) for result in results])
    chance = (_chance(benchmark, leaf, results) or 0.0) if benchmark.board == 2 else 0.0
    low, estimate, high = (
        100 * min(1.0, max(0.0, (value - chance) / (1 - chance))) for value in (raw.low, raw.estimate, raw.high)
    )
    return Interval(estimate, low, high)


def _board_value(benchmark: Benchmark, result: QuestionResult, results: Sequence[QuestionResult]) -> float:
    """What a question adds to the leaderboard's mean: its score; for IFEval half of it, and half its instructions.

    Right instructions over all instructions is the mean over questions of (right ones / mean number of them).
    """
    if benchmark.name != "ifeval":
        return result.correct
    each = _mean([other.metrics[f"{_INSTRUCTIONS}/of"] for other in results])
    return 0.5 * result.correct + 0.5 * result.metrics[f"{_INSTRUCTIONS}/right"] / each


def _interval(values: Sequence[float]) -> Interval:
    if max(values) <= 1 or len(values) < 2:
        return clustered_interval([[min(1.0, value)] for value in values])
    return mean_interval(values)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
