"""Choosing one of several checkpoints by their evaluations, and what the choice is worth.

The best of many noisy scores is too high, and more so the more there are to choose from. So the choice is made on the
validation split, and the chosen checkpoint is then evaluated on the test split, once. Choosing on the test split is
refused unless it is asked for, and leaves a mark on the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_nemo.errors import InputError
from prism_nemo.evaluation.comparing.folder import (
    EVALUATION,
    EvaluationFolder,
    distinct_names,
    question_value,
    read_folder,
)
from prism_nemo.evaluation.comparing.retention import APART
from prism_nemo.evaluation.comparing.same_questions import check_same
from prism_nemo.evaluation.statistics.bootstrap import resampled_means
from prism_nemo.evaluation.statistics.intervals import numbers_of
from prism_nemo.run import write_json

DOMAIN_WEIGHTED, PLAIN_MEAN = "domain_weighted", "plain_mean"
SELECTION = "selection.json"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that could have been chosen.

    Attributes:
        name: Of the model.
        path: Its evaluation folder.
        estimate: Value of the criterion.
        probability: That it would be the best on other questions of the kind: its share of bootstrap draws in which it
            is, ties divided. Questions are drawn, the same ones for all candidates.
    """

    name: str
    path: str
    estimate: float
    probability: float


@dataclass(frozen=True)
class Choice:
    """The outcome.

    Attributes:
        chosen: The best by its estimate; of equal ones the first.
        criterion: domain_weighted, plain_mean or the name of a task.
        split: That it was made on.
        higher_is_better: False for a loss.
        candidates: In the order given.
        optimism: How much better the estimate of the chosen one is expected to be than its true value, because it was
            chosen by it (bootstrap): the mean over draws of the best one's drawn score minus its score on all
            questions.
        corrected: The chosen one's estimate without the optimism.
        marks: What a reader of the chosen one's scores has to know; empty for a choice on the validation split.
    """

    chosen: Candidate
    criterion: str
    split: str
    higher_is_better: bool
    candidates: list[Candidate]
    optimism: float
    corrected: float
    marks: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return dataclasses.asdict(self)


def choose_checkpoint(
    paths: Sequence[Path],
    criterion: str = PLAIN_MEAN,
    on_test: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> Choice:
    """Choose the checkpoint with the best score.

    Args:
        paths: Evaluation folders of the checkpoints, all on the same questions.
        criterion: ``domain_weighted`` or ``plain_mean`` of the accuracies (without long context), or a task.
        on_test: Allow another split than validation, and mark the result.
        resamples: Of the bootstrap, at least 100.
        seed: Of the bootstrap.

    Raises:
        InputError: Fewer than two folders, evaluations that are not alike, another split than validation where that was
            not asked for, an unknown criterion.
    """
    if len(paths) < 2:
        raise InputError("selection: give the evaluations of at least two checkpoints")
    if resamples < 100:
        raise InputError(f"resamples {resamples} must be at least 100")
    folders = [read_folder(path) for path in paths]
    for other in folders[1:]:
        check_same(folders[0], other)
    split = folders[0].evaluation.split
    if split != "validation" and not on_test:
        raise InputError(
            f"the evaluations are on the {split} split: the best of {len(folders)} scores there would be too high. "
            "Evaluate the checkpoints with --split validation, choose, and evaluate the chosen one on test; or allow "
            "it (on_test), and the result is marked"
        )
    weights, sign = _weights(folders[0], criterion)
    estimates, drawn = np.zeros(len(folders)), np.zeros((resamples, len(folders)))
    for number, (task, weight) in enumerate(weights.items()):
        values = _values(folders, task)
        estimates += weight * values.mean(axis=0)
        drawn += weight * resampled_means(values, resamples, seed + number)
    # The mean over all draws is the estimate itself; that of some draws is off by chance, which is no optimism.
    drawn += estimates - drawn.mean(axis=0)
    chosen = int(np.argmax(sign * estimates))
    ranked = sign * drawn
    # Scores of equal models differ by the rounding of their sums.
    best = ranked >= ranked.max(axis=1, keepdims=True) - 1e-12
    probabilities = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    found = (np.where(best, sign * estimates, 0).sum(axis=1) / best.sum(axis=1)).mean()
    optimism = max(0.0, float(ranked.max(axis=1).mean() - found))
    candidates = [
        Candidate(name, str(folder.path), float(estimate), float(probability))
        for name, folder, estimate, probability in zip(
            distinct_names(folders), folders, estimates, probabilities, strict=True
        )
    ]
    marks = []
    if split != "validation":
        marks.append(
            f"chosen on the {split} split among {len(folders)} checkpoints by {criterion}: the score is expected to be "
            f"too good by {optimism:.4f}"
        )
    corrected = float(estimates[chosen] - sign * optimism)
    return Choice(candidates[chosen], criterion, split, sign > 0, candidates, optimism, corrected, marks)


def record_choice(choice: Choice, out: Path) -> None:
    """Write ``selection.json`` into a folder, and the choice's marks into the evaluation of the chosen checkpoint.

    Raises:
        InputError: If the evaluation can no longer be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(choice.chosen.path)
    evaluation = read_folder(folder).evaluation
    new = [mark for mark in choice.marks if mark not in evaluation.marks]
    if new:
        marked = dataclasses.replace(evaluation, marks=[*evaluation.marks, *new])
        write_json(folder / EVALUATION, dataclasses.asdict(marked))
    write_json(out / SELECTION, choice.to_dict())


def _weights(folder: EvaluationFolder, criterion: str) -> tuple[dict[str, float], float]:
    """Weight of each task, and 1 or -1 for a loss."""
    tasks = folder.evaluation.tasks
    if criterion in tasks:
        return {criterion: 1.0}, 1.0 if tasks[criterion].higher_is_better else -1.0
    if criterion not in (DOMAIN_WEIGHTED, PLAIN_MEAN):
        known = ", ".join((DOMAIN_WEIGHTED, PLAIN_MEAN, *tasks))
        raise InputError(f"criterion: '{criterion}' is unknown; known: {known}")
    names = [name for name, score in tasks.items() if score.higher_is_better and score.domain not in APART]
    if not names:
        raise InputError(f"criterion: {criterion} needs accuracies, and the evaluations have none; name a task")
    if criterion == PLAIN_MEAN:
        return {name: 1 / len(names) for name in names}, 1.0
    domains = [tasks[name].domain for name in names]
    count = len(set(domains))
    return {name: 1 / count / domains.count(d) for name, d in zip(names, domains, strict=True)}, 1.0


def _values(folders: Sequence[EvaluationFolder], task: str) -> np.ndarray:
    """[questions, models]; rows of text weigh as their tokens do."""
    score = folders[0].evaluation.tasks[task]
    columns = [
        numbers_of([question_value(q, score.metric) for q in folder.questions[task]], f"{folder.path}: {task}")
        for folder in folders
    ]
    values = np.stack(columns, axis=1)
    if score.higher_is_better:
        return values
    tokens = np.array([q.metrics.get("tokens", 1.0) for q in folders[0].questions[task]])
    return values * (tokens / tokens.mean())[:, None]
