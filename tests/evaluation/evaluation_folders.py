"""Evaluation folders with known answers, written as an evaluation writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.evaluation.answering.store import EVALUATION, SAMPLES, write_results
from prism_nemo.evaluation.held_out_loss import source_score
from prism_nemo.evaluation.result import Answer, Evaluation, QuestionResult, TaskScore
from prism_nemo.evaluation.statistics.intervals import clustered_interval
from prism_nemo.run import write_json

SETTINGS = {"engine": "megatron", "tokenizer": "abc", "sampling": {"temperature": 0.6, "seed": 0}}


def questions(outcomes: Sequence[Sequence[float]], split: str = "test") -> list[QuestionResult]:
    """One question for each list of outcomes."""
    return [
        QuestionResult(
            f"q{number:03d}",
            split,
            f"What is {number}?",
            str(number),
            [Answer(f"It is {number if x else -1}.", 5, True, str(number if x else -1), float(x)) for x in row],
        )
        for number, row in enumerate(outcomes)
    ]


def rows(losses: Sequence[float], tokens: int = 100) -> list[QuestionResult]:
    """Rows of held-out text."""
    return [
        QuestionResult(f"row-{i}", "test", "", f"hash {i}", [], metrics={"loss": float(x), "tokens": float(tokens)})
        for i, x in enumerate(losses)
    ]


def accuracy(found: Sequence[QuestionResult], domain: str = "math", metric: str = "pass@1") -> TaskScore:
    """The score of questions with answers."""
    interval = clustered_interval([[answer.correct for answer in q.answers] for q in found])
    ends = interval.estimate, interval.low, interval.high
    return TaskScore(domain, metric, *ends, len(found), len(found[0].answers))


def write_folder(
    folder: Path,
    tasks: Mapping[str, tuple[str, Sequence[Sequence[float]]]],
    losses: Mapping[str, Sequence[float]] | None = None,
    split: str = "test",
    settings: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Tasks by name with their domain and outcomes, and losses of rows by name."""
    results = {name: questions(outcomes, split) for name, (_, outcomes) in tasks.items()}
    scores = {name: accuracy(results[name], domain) for name, (domain, _) in tasks.items()}
    for name, values in (losses or {}).items():
        results[name] = rows(values)
        scores[name] = source_score(results[name])
    model = {"path": str(folder), "kind": "native", "hash": folder.name, "name": folder.name}
    values = {"suite": "pocket", "split": split, "model": model, "settings": dict(settings or SETTINGS), **changes}
    write_json(folder / EVALUATION, dataclasses.asdict(Evaluation(tasks=scores, **values)))
    for name, found in results.items():
        write_results(folder / SAMPLES / f"{name}.jsonl", found)
    return folder
