"""What lm-eval logs of each question, as lines of our results; nothing is lost or counted twice on the way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from prism_nemo.errors import PrismError
from prism_nemo.evaluation.harness.tasks.loading import Leaf
from prism_nemo.evaluation.harness.tasks.table import Benchmark
from prism_nemo.evaluation.result import Answer, QuestionResult

# The two means add in another order, nothing else.
_SAME = 1e-9


def question_results(
    leaf: Leaf,
    benchmark: Benchmark,
    samples: list[dict[str, Any]],
    aggregate: dict[str, Any],
    count_tokens: Callable[[str], int],
    was_cut: Callable[[str, str], bool],
) -> list[QuestionResult]:
    """One result for each question of a task, in the task's order.

    Args:
        leaf: The task.
        benchmark: Which metric and filter count.
        samples: As logged by lm-eval: one for each question and filter.
        aggregate: lm-eval's own result of the task; the mean over our results has to be the same.
        count_tokens: Length of an answer.
        was_cut: Whether the answer to a prompt reached the longest allowed length.

    Returns:
        The id is the name of the task and lm-eval's hash of the question, so that the same question has the same id
        for every model.

    Raises:
        PrismError: Questions are missing or double, the metric is not there, or the mean differs from lm-eval's.
    """
    chosen = [sample for sample in samples if sample["filter"] == benchmark.filter]
    places = [sample["doc_id"] for sample in chosen]
    if sorted(places) != list(range(len(leaf.docs))):
        raise PrismError(f"{leaf.name}: {len(leaf.docs)} questions were asked, but {len(places)} answers came back")
    others: dict[int, dict[str, float]] = {place: {} for place in places}
    for sample in samples:
        suffix = "" if sample["filter"] == benchmark.filter else f"/{sample['filter']}"
        for name in sample["metrics"]:
            if suffix or name != benchmark.metric:
                others[sample["doc_id"]] |= _scalars(f"{name}{suffix}", sample[name])
    results: list[QuestionResult] = []
    seen: Counter[str] = Counter()
    for sample in sorted(chosen, key=lambda sample: sample["doc_id"]):
        number = f"{leaf.name}/{sample['doc_hash'][:16]}"
        seen[number] += 1
        if seen[number] > 1:  # the same question twice in a benchmark; both count there
            number = f"{number}#{seen[number]}"
        results.append(
            QuestionResult(
                id=number,
                split="test",
                prompt=_prompt(sample),
                gold=_gold(leaf, sample),
                answers=[_answer(leaf, benchmark, sample, count_tokens, was_cut)],
                logprobs=_logprobs(leaf, sample),
                metrics=others[sample["doc_id"]],
            )
        )
    _check_mean(leaf.name, benchmark, results, aggregate)
    return results


def options_of(result: QuestionResult) -> int:
    """Number of options of a multiple-choice question; 0 for one that is answered in words."""
    return len(result.logprobs)


def _prompt(sample: dict[str, Any]) -> str:
    """What the model was given; where each option has its own text (Winogrande) all of them, one after the other."""
    contexts = dict.fromkeys(arguments[0] for arguments in sample["arguments"])
    return "\n---\n".join(contexts)


def _is_choice(leaf: Leaf) -> bool:
    return leaf.task.OUTPUT_TYPE == "multiple_choice"


def _logprobs(leaf: Leaf, sample: dict[str, Any]) -> list[float]:
    """Of each option, without what some tasks ask beside them."""
    if not _is_choice(leaf):
        return []
    choices = leaf.task.doc_to_choice(leaf.docs[sample["doc_id"]])
    return [float(answers[0][0]) for answers in sample["resps"][: len(choices)]]


def _gold(leaf: Leaf, sample: dict[str, Any]) -> str:
    """The right answer, as text."""
    doc, target = leaf.docs[sample["doc_id"]], sample["target"]
    if not _is_choice(leaf):
        return str(target)
    choices = leaf.task.doc_to_choice(doc)
    if leaf.task.multiple_input:  # the target is what follows all options; the right one is where the text would be
        target = leaf.task.doc_to_text(doc)
    right = target if isinstance(target, list) else [target]
    return " | ".join(choices[index] if isinstance(index, int) and index >= 0 else str(index) for index in right)


def _answer(
    leaf: Leaf,
    benchmark: Benchmark,
    sample: dict[str, Any],
    count_tokens: Callable[[str], int],
    was_cut: Callable[[str, str], bool],
) -> Answer:
    if benchmark.metric not in sample:
        raise PrismError(f"{leaf.name}: lm-eval gave no '{benchmark.metric}'; it gave {', '.join(sample['metrics'])}")
    value = float(sample[benchmark.metric])
    if not 0 <= value <= 1:
        raise PrismError(f"{leaf.name}: '{benchmark.metric}' of a question is {value}; a score from 0 to 1 is needed")
    if _is_choice(leaf):
        choices = leaf.task.doc_to_choice(leaf.docs[sample["doc_id"]])
        logprobs = _logprobs(leaf, sample)
        lengths = [max(1, len(choice)) if benchmark.metric == "acc_norm" else 1 for choice in choices]
        best = max(range(len(choices)), key=lambda place: logprobs[place] / lengths[place])
        return Answer("", 0, True, choices[best], value)
    text = sample["resps"][0][0]
    read = sample["filtered_resps"][0]
    cut = was_cut(sample["arguments"][0][0], text)
    failure = "nothing was answered" if not text.strip() else "cut off" if cut and value == 0 else None
    return Answer(text, count_tokens(text), not cut, str(read), value, failure)


def _scalars(name: str, value: Any) -> dict[str, float]:
    """A metric as numbers: lists (IFEval's instructions) as how many there are and how many of them are right."""
    if isinstance(value, bool | int | float) or hasattr(value, "item"):
        return {name: float(value)}
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, bool | int) for v in value):
        return {f"{name}/right": float(sum(value)), f"{name}/of": float(len(value))}
    return {}


def _check_mean(name: str, benchmark: Benchmark, results: list[QuestionResult], aggregate: dict[str, Any]) -> None:
    theirs = aggregate.get(f"{benchmark.metric},{benchmark.filter}")
    ours = math.fsum(result.correct for result in results) / len(results)
    if theirs is None or abs(float(theirs) - ours) > _SAME:
        raise PrismError(f"{name}: our mean of '{benchmark.metric}' is {ours}, lm-eval's is {theirs}")
