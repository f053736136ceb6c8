"""Questions that a model forgot or learned, told apart from the chance of sampling where there are several samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from prism_nemo.evaluation.comparing.folder import question_value
from prism_nemo.evaluation.result import Answer, QuestionResult

_LEVEL = 0.05
_LONGEST = 600  # characters of a prompt or answer in an example


@dataclass(frozen=True)
class Example:
    """A question that changed.

    Attributes:
        id: Of the question.
        prompt: What both models were given, cut in the middle where it is long.
        gold: The right answer.
        before: Share of the base model's answers that are right.
        after: Share of the model's.
        base_answer: One of the base model's answers, of the kind that its share speaks of; empty where likelihoods were
            compared.
        model_answer: One of the model's.
    """

    id: str
    prompt: str
    gold: str
    before: float
    after: float
    base_answer: str
    model_answer: str


@dataclass(frozen=True)
class Items:
    """The questions of a task that changed.

    Attributes:
        forgotten: Ids.
        learned: Ids.
        by_chance: How many would be expected in either list if every question kept its accuracy.
        forgotten_examples: The largest drops.
        learned_examples: The largest rises.
    """

    forgotten: list[str]
    learned: list[str]
    by_chance: float
    forgotten_examples: list[Example] = field(default_factory=list)
    learned_examples: list[Example] = field(default_factory=list)


def compare_items(
    before: Sequence[QuestionResult], after: Sequence[QuestionResult], metric: str, examples: int
) -> Items:
    """Find the questions that one model has right and the other wrong.

    With one answer: right (a value of at least 0.5) before and wrong after. With k answers each: a drop in the number
    of right ones that Fisher's exact test, one-sided, gives at most 5 % given the sum of both; where k is below 3 no
    drop is so unlikely, and it has to be from all right to all wrong. The number expected by chance is that of the same
    test if each sum were dealt out at random: with one answer it is half of the questions that changed either way, as
    in McNemar's test.

    Args:
        before: The base model's questions, in the same order as
        after: the model's.
        metric: Of the task.
        examples: At most so many of each kind.
    """
    forgotten, learned, chance = [], [], 0.0
    for old, new in zip(before, after, strict=True):
        first, second, size = *_counts(old, new, metric), max(1, len(old.answers))
        chance += _chance(first + second, size)
        if _is_drop(first, second, size):
            forgotten.append((old, new))
        elif _is_drop(second, first, size):
            learned.append((old, new))
    return Items(
        [old.id for old, _ in forgotten],
        [old.id for old, _ in learned],
        chance,
        _examples(forgotten, metric, examples),
        _examples(learned, metric, examples),
    )


def _counts(old: QuestionResult, new: QuestionResult, metric: str) -> tuple[int, int]:
    """Right answers of both models."""
    if metric in old.metrics or len(old.answers) <= 1:
        return int(question_value(old, metric) >= 0.5), int(question_value(new, metric) >= 0.5)
    return sum(a.correct >= 1 for a in old.answers), sum(a.correct >= 1 for a in new.answers)


@lru_cache(maxsize=65536)
def _is_drop(first: int, second: int, size: int) -> bool:
    """Whether `second` of `size` is below `first` of `size` beyond chance."""
    # All right to all wrong is the least likely of all.
    limit = max(_LEVEL, 1 / math.comb(2 * size, size))
    return first > second and drop_p(first, second, size) <= limit * (1 + 1e-9)


def drop_p(first: int, second: int, size: int) -> float:
    """P(at least `first` of the right answers are the first model's), given their sum (Fisher's exact test)."""
    total = first + second
    ways = sum(math.comb(size, i) * math.comb(size, total - i) for i in range(first, min(size, total) + 1))
    return ways / math.comb(2 * size, total)


@lru_cache(maxsize=4096)
def _chance(total: int, size: int) -> float:
    """Probability of a drop beyond chance if `total` right answers are dealt out at random to two times `size`."""
    ways = sum(
        math.comb(size, i) * math.comb(size, total - i)
        for i in range(max(0, total - size), min(size, total) + 1)
        if _is_drop(i, total - i, size)
    )
    return ways / math.comb(2 * size, total)


def _examples(changed: list[tuple[QuestionResult, QuestionResult]], metric: str, most: int) -> list[Example]:
    found = []
    for old, new in changed:
        before, after = question_value(old, metric), question_value(new, metric)
        base_answer = _told(old.answers, right=before > after)
        model_answer = _told(new.answers, right=after > before)
        found.append(Example(old.id, _cut(old.prompt), _cut(old.gold), before, after, base_answer, model_answer))
    return sorted(found, key=lambda example: (-abs(example.after - example.before), example.id))[:most]


def _told(answers: Sequence[Answer], right: bool) -> str:
    """The first answer that is right, or wrong."""
    for answer in answers:
        if (answer.correct >= 1) == right:
            return _cut(answer.text or answer.read or answer.failure or "")
    return ""


def _cut(text: str) -> str:
    """The beginning and the end of a text: a question is often at the end of its prompt."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} [...] {text[-half:]}"
