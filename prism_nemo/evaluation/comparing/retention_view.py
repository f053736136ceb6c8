"""The retention report as people read it: one table in a terminal, the same with examples as Markdown, and as JSON."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.evaluation.comparing.forgotten import Example
from prism_nemo.evaluation.comparing.retention import (
    GAINED,
    KEPT,
    LOST,
    SHARE,
    UNCLEAR,
    Line,
    ModelRetention,
    Retention,
)
from prism_nemo.run import write_json

MIN_WIDTH = 130
_STYLES = {KEPT: "green", LOST: "red", GAINED: "cyan", UNCLEAR: "yellow"}
_COLUMNS = ("task", "base", "model", "change", "95 % interval", "gain", "loss", "forgotten", "learned", "sees from")


def write_retention(report: Retention, out: Path) -> None:
    """Write ``retention.json`` and ``retention.md`` into a folder, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "retention.json", report.to_dict())
    write_text(out / "retention.md", retention_markdown(report))


def retention_view(report: Retention) -> RenderableType:
    """A table for each model, and how to read them; whole from `MIN_WIDTH` columns on."""
    title = f"Retention: suite {report.suite}, split {report.split}; accuracies in points, text in nats per token"
    parts: list[RenderableType] = [Text(title)]
    for model in report.models:
        parts += [Text(f"\n{model.name} against {report.base}", "bold"), _table(model)]
    notes = [Text(f"\n{note}", "dim") for note in report.notes]
    marks = [Text(f"\n{mark}", "yellow") for mark in report.marks]
    return Group(*parts, *notes, *marks)


def _table(model: ModelRetention) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(_COLUMNS[0], no_wrap=True)
    for column in _COLUMNS[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for line in model.lines:
        cells = [Text(cell) for cell in _cells(line)]
        table.add_row(*cells, Text(_verdict(line), _STYLES[line.verdict]))
    return table


def retention_markdown(report: Retention) -> str:
    """The report with examples of what was forgotten and learned."""
    parts = [
        f"# Retention against {report.base}",
        f"Suite {report.suite}, split {report.split}. Accuracies are in points (0 to 100), held-out text in nats per "
        "token; a change above 0 is better.",
    ]
    for model in report.models:
        rows = ["| " + " | ".join((*_COLUMNS, "verdict")) + " |", "|---|" + "---:|" * (len(_COLUMNS) - 1) + "---|"]
        rows += ["| " + " | ".join(map(_escaped, (*_cells(line), _verdict(line)))) + " |" for line in model.lines]
        parts += [f"## {_escaped(model.name)}", "\n".join(rows)]
    parts += ["## How to read it", "\n".join(f"- {note}" for note in report.notes)]
    if report.marks:
        parts += ["## Marks", "\n".join(f"- {_escaped(mark)}" for mark in report.marks)]
    for model in report.models:
        for line in model.lines:
            if line.items is None:
                continue
            lists = (("Forgotten", line.items.forgotten_examples), ("Learned", line.items.learned_examples))
            for name, examples in lists:
                if examples:
                    parts.append(f"## {name}: {_escaped(line.name)}, {_escaped(model.name)}")
                    parts += [_example(example) for example in examples]
    return "\n\n".join(parts) + "\n"


def _cells(line: Line) -> tuple[str, ...]:
    scale, digits = (100.0, 2) if line.unit == SHARE else (1.0, 4)

    def number(value: float, sign: bool = False) -> str:
        return f"{scale * value:{'+' if sign else ''}.{digits}f}"

    forgotten = learned = ""
    if line.items is not None:
        chance = f" ({line.items.by_chance:.1f})"
        forgotten, learned = f"{len(line.items.forgotten)}{chance}", f"{len(line.items.learned)}{chance}"
    name = f"{line.name} (mean)" if line.kind == "domain" else line.name
    interval = f"{number(line.low, True)} to {number(line.high, True)}"
    values = number(line.base), number(line.model), number(line.change, True), interval
    return (name, *values, number(line.gain), number(line.loss), forgotten, learned, number(line.detectable))


def _verdict(line: Line) -> str:
    firm = line.verdict in (LOST, GAINED) and line.p_holm is not None and line.p_holm < 0.05
    return f"{line.verdict} *" if firm else line.verdict


def _example(example: Example) -> str:
    shares = f"`{example.id}`: right in {example.before:.0%} of the base model's answers, {example.after:.0%} after"
    parts = [("Prompt", example.prompt), ("Right answer", example.gold)]
    parts += [("Base model", example.base_answer), ("Model", example.model_answer)]
    blocks = [f"{name}:\n\n{_block(text)}" for name, text in parts if text]
    return "\n\n".join([shares, *blocks])


def _block(text: str) -> str:
    """A code block: four spaces before each line, which no text can close."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
