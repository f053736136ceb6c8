"""An evaluation for people: scores with their intervals, averages, and what a reader has to know."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prism_nemo.evaluation.result import Evaluation, TaskScore

# Narrower than this the table does not fit; a pipe counts as 80 columns.
MIN_WIDTH = 128


def evaluation_view(evaluation: Evaluation) -> RenderableType:
    """Scores in percent (losses in nats per token) with 95 % intervals over questions."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("task", "domain", "metric", "score", "95 % interval", "chance", "questions x samples", "notes"):
        left = name in ("task", "domain", "metric", "notes")
        table.add_column(name, justify="left" if left else "right", no_wrap=name in ("task", "95 % interval"))
    for name, score in evaluation.tasks.items():
        table.add_row(
            name,
            score.domain,
            score.metric,
            _value(score.estimate, score),
            f"{_value(score.low, score)} to {_value(score.high, score)}",
            "-" if score.chance is None else _value(score.chance, score),
            f"{score.questions} x {score.samples}",
            _notes(score),
        )
    averages = Table.grid(padding=(0, 2))
    for name, average in evaluation.averages.items():
        averages.add_row(
            name.replace("_", " "),
            f"{100 * average['estimate']:.1f}",
            f"{100 * average['low']:.1f} to {100 * average['high']:.1f}",
            Text("mean of " + "; ".join(f"{part}: {', '.join(names)}" for part, names in average["of"].items()), "dim"),
        )
    model = evaluation.model
    head = Text.assemble((str(model.get("name", "")), "bold cyan"), f"  {evaluation.suite}, {evaluation.split} split")
    marks = [Text(f"note: {mark}", "yellow") for mark in evaluation.marks]
    return Group(head, table, *([averages] if evaluation.averages else []), *marks)


def _value(value: float, score: TaskScore) -> str:
    return f"{100 * value:.1f}" if score.higher_is_better else f"{value:.4f}"


def _notes(score: TaskScore) -> str:
    said = []
    if score.details.get("format"):
        said.append(str(score.details["format"]))
    failures = score.details.get("failures")
    if isinstance(failures, dict) and failures:
        said.append(", ".join(f"{count} {kind}" for kind, count in failures.items()))
    return "; ".join(said)
