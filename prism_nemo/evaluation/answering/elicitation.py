"""Whether a model was asked properly: several prompt formats are tried and the best of them is used.

It is chosen on validation questions. The best of several test scores is too high by itself, so a choice on the test
split is refused unless it was asked for, and then it is marked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.formats import PromptFormat, format_named
from prism_nemo.evaluation.question import AskedSampling, EvaluationTask
from prism_nemo.evaluation.result import TaskScore
from prism_nemo.evaluation.settings import EvaluateConfig

# Answers to each validation question: enough to tell formats apart, and a fraction of a benchmark's 64.
SAMPLES = 4


@dataclass(frozen=True)
class Choice:
    """The prompt format of a task, and what it was chosen by.

    Attributes:
        form: The format.
        details: What the result says about it.
        mark: What a reader has to know, or None.
    """

    form: PromptFormat
    details: dict[str, Any]
    mark: str | None = None


def candidates(task: EvaluationTask, settings: EvaluateConfig) -> list[PromptFormat]:
    """The formats that a task is tried with; one if none is to be chosen.

    Raises:
        InputError: For an unknown format, or if there is nothing to choose from.
    """
    names = settings.formats or (task.formats if settings.elicit else task.formats[:1])
    if settings.elicit and len(names) < 2:
        raise InputError(
            f"{task.name}: a format can only be chosen among two or more, and there is '{', '.join(names)}'; name "
            "them with --format"
        )
    return [format_named(name) for name in names]


def split_to_choose_on(task: EvaluationTask, settings: EvaluateConfig) -> str:
    """The split whose questions decide between formats.

    Raises:
        InputError: If there are no validation questions, and the choice is not allowed to be made on test.
    """
    if settings.choose_on_test and settings.split == "test":
        return "test"
    if any(question.split == "validation" for question in task.questions):
        return "validation"
    raise InputError(
        f"{task.name}: a prompt format is chosen on validation questions, and there are none. Put some into a file "
        f"{task.name}.validation.jsonl beside {task.name}.jsonl, name one --format, or allow the choice on the test "
        "split with --choose-on-test, which marks the result"
    )


def trial_sampling(sampling: AskedSampling) -> AskedSampling:
    """How the formats are tried."""
    return replace(sampling, samples=min(sampling.samples, SAMPLES))


def choose(task: EvaluationTask, scores: Mapping[str, TaskScore], split: str) -> Choice:
    """The format with the best score; of equal ones the first.

    Args:
        task: Whose.
        scores: By name of the format, in the order in which they are preferred.
        split: That the scores are of.
    """
    best = max(scores, key=lambda name: scores[name].estimate)
    tried = {
        name: {
            "estimate": score.estimate,
            "low": score.low,
            "high": score.high,
            "questions": score.questions,
            "samples": score.samples,
            "answer_rate": score.details["answer_rate"],
        }
        for name, score in scores.items()
    }
    mark = None
    if split == "test":
        mark = f"{task.name}: the prompt format was chosen on the test split, so its score is too high"
    return Choice(format_named(best), {"format": best, "formats": tried, "chosen_on": split}, mark)
