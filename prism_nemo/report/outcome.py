"""The parts about results: where each checkpoint comes from, what was gained and what was lost."""

from __future__ import annotations

import math

from prism_nemo.report import charts, lineage
from prism_nemo.report.formatting import (
    NOT_MEASURED,
    compact,
    decimal,
    interval,
    percent,
    signed,
    significant,
    whole,
)
from prism_nemo.report.headline import compared_tasks, mean_accuracy
from prism_nemo.report.read import Record, mapping, number, objects
from prism_nemo.report.stages import STAGES, Stage, ordered, stage
from prism_nemo.report.svg import Style
from prism_nemo.report.view import Figure, Table


def lineage_figure(record: Record) -> Figure:
    """Draws where each checkpoint comes from, with its mean accuracy, its retention loss and the tokens it saw."""
    tasks = compared_tasks(record)
    present = record.present
    places = {"base": (0, 0), "midtrained": (1, 0), "prism_rl": (2, 0), "base_rl": (1, 1), "midtrained_longer": (2, 1)}
    nodes, edges, rows = [], [], []
    order = list(places)
    for key, (column, row) in places.items():
        one = stage(key)
        mean = mean_accuracy(record, key, tasks)
        loss = number(record.stages.get(key, {}).get("retention_loss"))
        lines = (f"accuracy {percent(mean.value if mean else None)}", f"retention loss {decimal(loss)}")
        nodes.append(
            lineage.Node(one.label, one.style, column, row, lines if key in present else ("not run",), key in present)
        )
        amount = _amount(record, key)
        rows.append((one.label, stage(one.parent).label if one.parent else "random weights", one.explanation, amount))
        if one.parent:
            edges.append(lineage.Edge(order.index(one.parent), order.index(key), (one.explanation, amount)))
    export = mapping(record.summary.get("hf_export"))
    loads, gap = export.get("loads_in_transformers"), number(export.get("max_abs_logit_diff"))
    state = "loads in transformers" if loads is True else "does not load" if loads is False else "loading not measured"
    about = (state, f"logit gap {significant(gap)}")
    nodes.append(
        lineage.Node("HF checkpoint", Style("s-other"), 3, 0, about if export else ("not exported",), bool(export))
    )
    edges.append(lineage.Edge(order.index("prism_rl"), len(order), ("export", "")))
    return Figure(
        "Where each checkpoint comes from",
        lineage.draw(nodes, edges),
        "Accuracy is the unweighted mean over the task families that were measured in every stage. Retention loss is "
        "the loss on general text. Each stage keeps its colour and its mark in every chart below.",
        Table(("checkpoint", "starts from", "by", "trained on"), rows, "Lineage"),
        wide=True,
    )


def accuracy_figures(record: Record) -> tuple[list[Figure], Table]:
    """Draws one panel per task family with a row per stage, and puts all their numbers into one table."""
    stages = [one for one in ordered(record.stages) if record.tasks(one.key)]
    for one in STAGES:
        if one.key not in record.stages:
            record.missing(f"{one.label}: the whole evaluation")
        elif not record.tasks(one.key):
            record.missing(f"{one.label}: accuracy on any task family")
    names = list(dict.fromkeys(name for one in stages for name in record.tasks(one.key)))
    figures, rows = [], []
    for name in names:
        estimates, counts = [], set()
        for one in stages:
            estimate, row, count = _task_row(record, one, name)
            estimates.append(estimate)
            rows.append((f"{name}: {one.label}", *row))
            if estimate.value is not None:
                counts.add(count)
        asked = f"{counts.pop()} problems per stage" if len(counts) == 1 else "number of problems differs, see table"
        svg = charts.interval_rows(
            estimates,
            title=f"Accuracy on {name}",
            value_format=percent,
            x_range=(0.0, 1.0),
            tick_format=lambda value: percent(value, 0),
        )
        figures.append(Figure(name, svg, asked))
    columns = ("task and stage", "sampled", "95% interval", "problems", "greedy", "95% interval", "format", "tokens")
    return figures, Table(columns, rows, "Accuracy by task family and stage")


def retention_figures(record: Record) -> list[Figure]:
    """Draws the loss on general text per stage, and the change of the loss per domain if it was measured."""
    stages = ordered(dict.fromkeys([one.key for one in STAGES] + list(record.stages)))
    losses = {
        one.key: record.number(record.stages[one.key].get("retention_loss"), f"{one.label}: retention loss")
        if one.key in record.stages
        else None
        for one in stages
    }
    base = losses.get("base")
    rows = [(one.label, decimal(losses[one.key]), *_from_base(losses[one.key], base)) for one in stages]
    estimates = [charts.Estimate(one.label, one.style, losses[one.key]) for one in stages]
    svg = charts.interval_rows(estimates, title="Loss on general text", value_format=decimal, reference=base, width=440)
    table = Table(("stage", "nats per token", "from base", "perplexity"), rows, "Retention loss")
    caption = "Nats per token; lower is better. The dashed line is the base. The axis is cut."
    figures = [Figure("Loss on general text", svg, caption, table)]
    domains = _domain_figure(record, stages)
    return [*figures, domains] if domains else figures


def _domain_figure(record: Record, stages: list[Stage]) -> Figure | None:
    losses = {one.key: mapping(record.stages.get(one.key, {}).get("domain_losses")) for one in stages}
    names = list(dict.fromkeys(name for found in losses.values() for name in found))
    measured = [one for one in stages if losses[one.key]]
    if not names or not measured:
        return None
    rows, strips = [], []
    for one in measured:
        values = [number(losses[one.key].get(name)) for name in names]
        bases = [number(losses.get("base", {}).get(name)) for name in names]
        rows.append((one.label, *(decimal(value) for value in values)))
        if one.key != "base":
            pairs = zip(values, bases, strict=True)
            strips.append((one.label, [a - b if a is not None and b is not None else None for a, b in pairs]))
    svg = charts.heat_strip(
        strips, names, title="Change of the loss by domain", value_format=signed, centre=0.0, least_reach=0.1, width=440
    )
    caption = "Against the base, nats per token: blue is a lower loss (learned), orange a higher one (lost)."
    return Figure("Change of the loss by domain", svg, caption, Table(("stage", *names), rows, "Loss by domain"))


def _task_row(record: Record, one: Stage, name: str) -> tuple[charts.Estimate, tuple[str, ...], str]:
    task = record.tasks(one.key).get(name, {})
    value = record.share(task.get("accuracy"), f"{one.label}: accuracy on {name}")
    low, high = record.interval(task.get("ci95"), f"{one.label}: interval of the accuracy on {name}")
    greedy = record.share(task.get("greedy_accuracy"), f"{one.label}: greedy accuracy on {name}")
    greedy_low, greedy_high = record.interval(task.get("greedy_ci95"), f"{one.label}: greedy interval on {name}")
    count = whole(number(task.get("n")))
    row = (
        percent(value),
        interval(low, high),
        count,
        percent(greedy),
        interval(greedy_low, greedy_high),
        percent(record.share(task.get("format_rate"), f"{one.label}: format rate on {name}")),
        decimal(record.number(task.get("mean_response_tokens"), f"{one.label}: response tokens on {name}"), 1),
    )
    return charts.Estimate(one.label, one.style, value, low, high, greedy), row, count


def _from_base(loss: float | None, base: float | None) -> tuple[str, str]:
    if loss is None or base is None:
        return NOT_MEASURED, NOT_MEASURED
    growth = math.expm1(min(50.0, loss - base))
    return signed(loss - base), f"{100 * growth:+.1f}%".replace("-", "−")


def _amount(record: Record, key: str) -> str:
    parts = [part for part in objects(record.summary.get("timeline")) if part.get("stage") == key]
    tokens = [found for part in parts if (found := number(part.get("tokens"))) is not None]
    if tokens:
        return f"{compact(sum(tokens))} tokens"
    steps = record.metrics[key].series("step")[0] if key in record.metrics else []
    return f"{whole(steps[-1])} steps" if steps else ""
