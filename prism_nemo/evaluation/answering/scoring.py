"""From verdicts to scores: pass@1 with its interval, what goes with it, and the averages over tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prism_nemo.evaluation.answering.grading import CUT_OFF, REPEATING
from prism_nemo.evaluation.question import EvaluationTask, Question
from prism_nemo.evaluation.result import QuestionResult, TaskScore
from prism_nemo.evaluation.statistics.intervals import (
    clustered_interval,
    majority_at_k,
    pass_at_k,
    weighted_mean_interval,
)

# Of the study's average (arXiv 2603.17074, footnote 1): each weighs a third, whatever the number of its tasks.
DOMAINS = ("math", "code", "science")
ACCURACY = "pass@1"


def score_task(
    task: EvaluationTask, questions: Sequence[Question], results: Sequence[QuestionResult], details: Mapping[str, Any]
) -> TaskScore:
    """The score of a task from its judged answers.

    Args:
        task: Whose.
        questions: Those that were asked.
        results: Their answers; every question has the same number.
        details: Added to what is counted here.
    """
    correct = correct_by_question(results)
    interval = clustered_interval(correct)
    answers = [answer for result in results for answer in result.answers]
    samples = min(len(outcomes) for outcomes in correct)
    code = any(question.problem.verifier == "code" for question in questions)
    read = [[answer.read for answer in result.answers] for result in results]
    counted: dict[str, Any] = {
        "answer_rate": sum(answer.read is not None for answer in answers) / len(answers),
        "mean_tokens": sum(answer.tokens for answer in answers) / len(answers),
        "cut_off_rate": sum(answer.failure in (CUT_OFF, REPEATING) for answer in answers) / len(answers),
        "failures": dict(Counter(answer.failure for answer in answers if answer.failure)),
    }
    for k in _powers_of_two(samples):
        counted[f"pass@{k}"] = pass_at_k(correct, k)
        if not code:  # programs are hardly ever spelled alike
            counted[f"maj@{k}"] = majority_at_k(read, correct, k)
    return TaskScore(
        task.domain,
        ACCURACY,
        interval.estimate,
        interval.low,
        interval.high,
        len(results),
        samples,
        chance=_chance(questions),
        details={**counted, **details},
    )


def correct_by_question(results: Sequence[QuestionResult]) -> list[list[float]]:
    """For each question the verdicts of its answers, 0 to 1."""
    return [[answer.correct for answer in result.answers] for result in results]


def averages(
    scores: Mapping[str, TaskScore], results: Mapping[str, Sequence[QuestionResult]]
) -> dict[str, dict[str, Any]]:
    """The study's average and the plain mean of a suite's accuracies, each with what it averages.

    ``domain_weighted`` is the mean of the domains' means, each the mean of its tasks: one science task weighs as much
    as three of mathematics together. Where a domain is missing, the mean is over those that are there, and ``of``
    shows it. Losses are not averaged.

    Args:
        scores: Of the tasks.
        results: Their questions.
    """
    names = [name for name, score in scores.items() if score.metric == ACCURACY]
    if len(names) < 2:
        return {}
    groups = {d: [n for n in names if scores[n].domain == d] for d in dict.fromkeys(scores[n].domain for n in names)}
    found = {"plain_mean": {"all": names}}
    if set(groups) <= set(DOMAINS) and len(groups) > 1:
        found = {"domain_weighted": groups, **found}
    made: dict[str, dict[str, Any]] = {}
    for label, parts in found.items():
        outcomes = {part: [correct_by_question(results[name]) for name in tasks] for part, tasks in parts.items()}
        interval = weighted_mean_interval(outcomes)
        made[label] = {"estimate": interval.estimate, "low": interval.low, "high": interval.high, "of": parts}
    return made


def _powers_of_two(samples: int) -> list[int]:
    """2, 4, ... and the number of samples itself; pass@1 is the score."""
    return sorted({k for k in (2**i for i in range(1, 31)) if k < samples} | {samples}) if samples > 1 else []


def _chance(questions: Sequence[Question]) -> float | None:
    """What picking an option at random scores; None where there are no options."""
    options = [len(q.problem.metadata.get("options", ())) if q.problem.verifier == "choice" else 0 for q in questions]
    return sum(1 / count for count in options) / len(options) if options and min(options) > 1 else None
