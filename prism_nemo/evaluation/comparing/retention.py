"""What a model kept of its base model and what it lost, question by question, from evaluations of both.

A verdict is read off the 95 % interval of the paired change, which is positive where the model is better:

- kept: the whole interval lies within the margin (a test of equivalence, Schuirmann 1987, at 2.5 % on either side), so
  a change that matters is excluded, also where a smaller one is certain;
- lost, gained: otherwise, the interval lies below or above 0;
- not distinguishable: otherwise. The benchmark is too small for an answer, which is not the same as kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.evaluation.comparing.folder import (
    EVALUATION,
    EvaluationFolder,
    distinct_names,
    question_value,
    read_folder,
)
from prism_nemo.evaluation.comparing.forgotten import Items, compare_items
from prism_nemo.evaluation.comparing.same_questions import check_same
from prism_nemo.evaluation.result import QuestionResult
from prism_nemo.evaluation.statistics.differences import Difference, domain_difference, paired_difference, token_mean
from prism_nemo.evaluation.statistics.power import detectable
from prism_nemo.evaluation.statistics.quantiles import holm

KEPT, LOST, GAINED, UNCLEAR = "kept", "lost", "gained", "not distinguishable"
SHARE, NATS = "share", "nats per token"
MARGIN, LOSS_MARGIN = 0.01, 0.01
"""Changes that do not matter: one point of accuracy; 0.01 nats per token, one per cent of perplexity."""

APART = ("text", "long_context")
"""Domains that no average of accuracies takes in."""


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        name: Of the task, domain or average.
        kind: task, domain or average.
        domain: Of the task; empty for an average.
        metric: What `base` and `model` are, such as "pass@1" or "loss".
        unit: share (0 to 1), or nats per token.
        base: Score of the base model.
        model: Score of the model.
        change: How much better the model is: their difference, with its sign turned for a loss.
        low: Of the 95 % interval of the change.
        high: Of the same.
        gain: Mean over questions of the change where it is upward, 0 elsewhere; ``change = gain - loss``.
        loss: The same of the downward ones, as a positive number.
        verdict: kept, lost, gained or not distinguishable.
        margin: That "kept" was judged by.
        detectable: The smallest change that would be found with probability 0.8.
        p_value: That there is no change.
        p_holm: The same, corrected for the number of tasks in the report (Holm 1979); None for domains and averages.
        questions: Number of them.
        samples: Answers to each.
        items: Questions forgotten and learned; None where there are none to count (losses, averages).
    """

    name: str
    kind: str
    domain: str
    metric: str
    unit: str
    base: float
    model: float
    change: float
    low: float
    high: float
    gain: float
    loss: float
    verdict: str
    margin: float
    detectable: float
    p_value: float
    questions: int
    samples: int
    p_holm: float | None = None
    items: Items | None = None


@dataclass(frozen=True)
class ModelRetention:
    """A model against its base.

    Attributes:
        name: Of the model.
        path: Its evaluation folder.
        lines: Tasks by domain, then domains of several tasks, then averages.
    """

    name: str
    path: str
    lines: list[Line]


@dataclass(frozen=True)
class Retention:
    """The report.

    Attributes:
        base: Name of the base model.
        base_path: Its evaluation folder.
        suite: Name of the suite.
        split: validation or test.
        margin: In shares of right answers.
        loss_margin: In nats per token.
        models: In the order given.
        notes: How to read it.
        marks: Of the evaluations, and what differed between them and was let pass.
    """

    base: str
    base_path: str
    suite: str
    split: str
    margin: float
    loss_margin: float
    models: list[ModelRetention]
    notes: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return dataclasses.asdict(self)


def verdict(low: float, high: float, margin: float) -> str:
    """The verdict on an interval of changes; see the module."""
    if -margin <= low and high <= margin:
        return KEPT
    return LOST if high < 0 else GAINED if low > 0 else UNCLEAR


def retention(paths: Sequence[Path], evaluate: Callable[[Path], Path] | None = None, **options: Any) -> Retention:
    """`compare`, for evaluation folders and for models that have to be evaluated first.

    Args:
        paths: The base model, then the models. A folder with an ``evaluation.json`` is taken as it is.
        evaluate: From a checkpoint or Hugging Face folder to the folder of its evaluation.
        options: Of `compare`.

    Raises:
        InputError: As `compare`; fewer than two paths; a path that is no evaluation where nothing can evaluate it.
    """
    if len(paths) < 2:
        raise InputError("retention: give the base model and at least one model")
    folders = []
    for path in paths:
        if (path / EVALUATION).is_file():
            folders.append(path)
        elif evaluate is not None:
            folders.append(evaluate(path))
        else:
            raise InputError(f"{path}: holds no {EVALUATION}; run `prism-nemo eval {path}` first")
    return compare(folders[0], folders[1:], **options)


def compare(
    base: Path,
    models: Sequence[Path],
    margin: float = MARGIN,
    loss_margin: float = LOSS_MARGIN,
    examples: int = 5,
    may_differ: Sequence[str] = (),
) -> Retention:
    """Compare evaluations question by question.

    Args:
        base: Evaluation folder of the base model.
        models: Those of the models that came of it.
        margin: A change of accuracy up to this does not matter.
        loss_margin: The same for nats per token.
        examples: Questions shown of those forgotten, and of those learned, of each task.
        may_differ: What may differ all the same, and is marked: dotted names of settings, ``prompts``, ``tasks``
            (those of all evaluations are compared).

    Raises:
        InputError: A folder that cannot be read, evaluations that are not of the same questions asked in the same way
            (with the list of what differs), or a number out of range.
    """
    if not (0 < margin < 1 and loss_margin > 0):
        raise InputError(f"margin {margin} must lie between 0 and 1, and loss_margin {loss_margin} above 0")
    if examples < 0:
        raise InputError(f"examples {examples} must be 0 or more")
    first, others = read_folder(base), [read_folder(path) for path in models]
    marks = [f"{folder.name}: {mark}" for folder in (first, *others) for mark in folder.evaluation.marks]
    for other in others:
        marks += [mark for mark in check_same(first, other, may_differ) if mark not in marks]
    shared = [t for t in first.evaluation.tasks if all(t in other.evaluation.tasks for other in others)]
    if not shared:
        raise InputError(f"{base}: no task is in every evaluation")
    found = [
        ModelRetention(name, str(other.path), _lines(first, other, shared, margin, loss_margin, examples))
        for name, other in zip(distinct_names(others), others, strict=True)
    ]
    found = _corrected(found)
    about = first.evaluation
    notes = _notes(found, margin, loss_margin)
    return Retention(first.name, str(first.path), about.suite, about.split, margin, loss_margin, found, notes, marks)


def _lines(
    base: EvaluationFolder,
    model: EvaluationFolder,
    tasks: Sequence[str],
    margin: float,
    loss_margin: float,
    examples: int,
) -> list[Line]:
    lines, pairs = [], {}
    for task in sorted(tasks, key=lambda name: (base.evaluation.tasks[name].domain, list(tasks).index(name))):
        before, after = base.questions[task], model.questions[task]
        if base.evaluation.tasks[task].higher_is_better:
            metric = base.evaluation.tasks[task].metric
            pairs[task] = [[question_value(q, metric) for q in questions] for questions in (before, after)]
            lines.append(
                _accuracy_line(base, task, pairs[task], compare_items(before, after, metric, examples), margin)
            )
        else:
            lines.append(_loss_line(base, task, before, after, loss_margin))
    domains: dict[str, list[str]] = {}
    for task in pairs:
        domains.setdefault(base.evaluation.tasks[task].domain, []).append(task)
    for domain, names in domains.items():
        if len(names) > 1:
            lines.append(_average_line(domain, "domain", domain, lines, {domain: names}, pairs, margin))
    averaged = {domain: names for domain, names in domains.items() if domain not in APART}
    if len(averaged) > 1:
        lines.append(_average_line("domain_weighted", "average", "", lines, averaged, pairs, margin))
    names = [name for part in averaged.values() for name in part]
    if len(names) > 1:
        lines.append(_average_line("plain_mean", "average", "", lines, {"all": names}, pairs, margin))
    return lines


def _accuracy_line(base: EvaluationFolder, task: str, pair: list[list[float]], items: Items, margin: float) -> Line:
    score = base.evaluation.tasks[task]
    change = paired_difference(pair[0], pair[1])
    parts = [after - before for before, after in zip(*pair, strict=True)]
    means = [sum(values) / len(values) for values in pair]
    return _line(task, "task", score.domain, score.metric, means, change, parts, margin, score.samples, items)


def _loss_line(
    base: EvaluationFolder,
    task: str,
    before: Sequence[QuestionResult],
    after: Sequence[QuestionResult],
    margin: float,
) -> Line:
    score = base.evaluation.tasks[task]
    tokens = [q.metrics.get("tokens", 1.0) for q in before]
    pair = [[question_value(q, score.metric) for q in questions] for questions in (before, after)]
    parts = [b - a for b, a in zip(*pair, strict=True)]
    total = sum(tokens)
    means = [sum(v * t for v, t in zip(values, tokens, strict=True)) / total for values in pair]
    weighted = [part * count * len(parts) / total for part, count in zip(parts, tokens, strict=True)]
    change = token_mean(parts, tokens)
    return _line(task, "task", score.domain, score.metric, means, change, weighted, margin, score.samples, None)


def _line(
    name: str,
    kind: str,
    domain: str,
    metric: str,
    means: Sequence[float],
    change: Difference,
    parts: Sequence[float],
    margin: float,
    samples: int,
    items: Items | None,
) -> Line:
    return Line(
        name=name,
        kind=kind,
        domain=domain,
        metric=metric,
        unit=NATS if items is None else SHARE,
        base=means[0],
        model=means[1],
        change=change.estimate,
        low=change.low,
        high=change.high,
        gain=sum(max(part, 0.0) for part in parts) / len(parts),
        loss=sum(max(-part, 0.0) for part in parts) / len(parts),
        verdict=verdict(change.low, change.high, margin),
        margin=margin,
        detectable=detectable(change.error, change.freedom),
        p_value=change.p_value,
        questions=len(parts),
        samples=samples,
        items=items,
    )


def _average_line(
    name: str,
    kind: str,
    domain: str,
    lines: Sequence[Line],
    domains: dict[str, list[str]],
    pairs: dict[str, list[list[float]]],
    margin: float,
) -> Line:
    """A mean of domains' means."""
    change = domain_difference({key: [(pairs[t][0], pairs[t][1]) for t in names] for key, names in domains.items()})
    of = {line.name: line for line in lines if line.kind == "task"}

    def mean(value: str) -> float:
        parts = [sum(getattr(of[t], value) for t in names) / len(names) for names in domains.values()]
        return sum(parts) / len(parts)

    return Line(
        name=name,
        kind=kind,
        domain=domain,
        metric="mean of tasks" if kind == "domain" or len(domains) == 1 else "mean of domains",
        unit=SHARE,
        base=mean("base"),
        model=mean("model"),
        change=change.estimate,
        low=change.low,
        high=change.high,
        gain=mean("gain"),
        loss=mean("loss"),
        verdict=verdict(change.low, change.high, margin),
        margin=margin,
        detectable=detectable(change.error, change.freedom),
        p_value=change.p_value,
        questions=sum(of[t].questions for names in domains.values() for t in names),
        samples=max(of[t].samples for names in domains.values() for t in names),
    )


def _corrected(models: Sequence[ModelRetention]) -> list[ModelRetention]:
    """With Holm's correction over all tasks of all models, which are looked at together."""
    adjusted = iter(holm([line.p_value for model in models for line in model.lines if line.kind == "task"]))
    return [
        dataclasses.replace(
            model,
            lines=[
                dataclasses.replace(line, p_holm=next(adjusted)) if line.kind == "task" else line
                for line in model.lines
            ],
        )
        for model in models
    ]


def _notes(models: Sequence[ModelRetention], margin: float, loss_margin: float) -> list[str]:
    tasks = [line for model in models for line in model.lines if line.kind == "task"]
    changed = [line for line in tasks if line.verdict in (LOST, GAINED)]
    firm = [line for line in changed if line.p_holm is not None and line.p_holm < 0.05]
    notes = [
        f"Kept: the 95 % interval of the change lies within {100 * margin:g} point(s) of accuracy, or {loss_margin:g} "
        "nats per token of held-out text. Not distinguishable: the interval holds 0 and reaches beyond that; the "
        "column `sees from` is the smallest change that such a comparison finds in 8 of 10 cases.",
        f"{len(tasks)} tasks were looked at together, so some intervals leave 0 out by chance. Of the {len(changed)} "
        f"lost or gained, {len(firm)} remain after Holm's correction (marked *).",
        "Intervals cover the choice of questions and the sampling of answers, not another training seed.",
    ]
    if any(line.items is not None for line in tasks):
        notes.append(
            "Forgotten: right before and wrong after; with several samples, a drop beyond chance (one-sided exact test "
            "at 5 %). Learned is the same the other way. In brackets: how many of either would be expected if every "
            "question had kept its accuracy."
        )
    return notes
