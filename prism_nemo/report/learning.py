"""The parts about training: what it was fed, the curves of the loss, and those of the RL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from prism_nemo.report import charts, curves
from prism_nemo.report.charts import Format, Series
from prism_nemo.report.formatting import NOT_MEASURED, compact, decimal, percent, significant, whole
from prism_nemo.report.read import Record, mapping, number, objects, words
from prism_nemo.report.stages import RL_KEYS, STAGES, stage
from prism_nemo.report.svg import Style
from prism_nemo.report.view import Figure, Table

TRAINED = tuple(one for one in STAGES if one.key not in RL_KEYS)
MIXTURE_STYLES = {
    "base": "s-base",
    "pretraining": "s-base",
    "midtraining": "s-midtrained",
    "midtrained": "s-midtrained",
}
SMOOTHED = "Line: mean over neighbouring steps; the band holds every recorded value."


def mixture_figures(record: Record) -> list[Figure]:
    """Draws the weights of each mixture, grouped by domain."""
    figures = []
    mixtures = {name: objects(sources) for name, sources in mapping(record.summary.get("mixtures")).items()}
    mixtures = {name: entries for name, entries in mixtures.items() if entries}
    alone = len(mixtures) == 1
    for name, entries in mixtures.items():
        entries.sort(key=lambda entry: words(entry.get("domain")))
        style = Style(MIXTURE_STYLES.get(name, "s-other"))
        bars, rows = [], []
        for entry in entries:
            weight = record.share(entry.get("weight"), f"Mixture {name}: weight of {words(entry.get('source'))}")
            source, domain = words(entry.get("source")), words(entry.get("domain"))
            epochs = number(entry.get("epochs"))
            note = f"{compact(number(entry.get('tokens')))} tokens, {significant(epochs)} epochs"
            bars.append(charts.Bar(source, style, weight, percent(weight), domain, note=note))
            rows.append((source, domain, percent(weight), whole(number(entry.get("tokens"))), significant(epochs)))
        longest = max(charts.CHARACTER * len(bar.label) for bar in bars)
        svg = charts.horizontal_bars(
            bars,
            title=f"Mixture: {name}",
            tick_format=lambda value: percent(value, 0),
            labels=min(240.0 if alone else 190.0, max(110.0, longest)),
            width=1000 if alone else 440,
        )
        table = Table(("source", "domain", "weight", "tokens", "epochs"), rows, f"Mixture {name}")
        figures.append(
            Figure(f"Mixture: {name}", svg, "Weight of each source by tokens, grouped by domain.", table, alone)
        )
    if not figures:
        record.missing("The mixtures of the training data")
    return figures


def loss_figure(record: Record) -> Figure:
    """Draws the training loss of every stage over the optimizer steps, counted along the lineage."""
    series, rows = [], []
    last: dict[str, float] = {}
    for one in TRAINED:
        metrics = record.metrics.get(one.key)
        if metrics is None:
            record.missing(f"{one.label}: training curve")
            continue
        steps, values = metrics.series("loss")
        before = last.get(one.parent or "", 0.0)
        # Counts on after the parent, unless the stage already counts that way itself.
        shift = before if steps and steps[0] <= before else 0.0
        last[one.key] = shift + steps[-1] if steps else before
        if not steps:
            record.missing(f"{one.label}: training loss")
            continue
        series.append(Series(one.label, one.style, [shift + step for step in steps], values))
        rows.append(curve_row(one.label, steps, values, decimal))
        steps, values = metrics.series("validation_loss")
        if steps:
            label = f"{one.label}, validation"
            series.append(Series(label, one.style, [shift + step for step in steps], values, points=True))
            rows.append(curve_row(label, steps, values, decimal))
    svg = charts.line_chart(
        series,
        title="Training loss",
        x_label="optimizer step, counted along the lineage",
        y_label="loss (nats per token)",
        width=1000,
        height=330,
    )
    caption = (
        f"{SMOOTHED} Hollow marks are the validation loss, where measured. The stages train on different data, so a "
        "jump between two of them is the data and not the model. The table counts the steps within each stage."
    )
    return Figure("Training loss", svg, caption, curve_table(rows, "Training loss"), wide=True)


def rl_figures(record: Record) -> tuple[list[Figure], list[Figure], Table]:
    """Draws the curves of both RL runs.

    Returns:
        The overall figures (reward, response length, entropy, live groups), one small figure per task family, and
        one table for all of these.
    """
    for key in RL_KEYS:
        if key not in record.metrics:
            record.missing(f"{stage(key).label}: RL curves")
    overall = [
        _rl_figure(record, "reward", "Reward", "mean reward", "Mean over all sampled responses of a step.", (0, 1)),
        _rl_figure(
            record, "response_length", "Response length", "tokens", "Watch for growth without reward, or for collapse."
        ),
        _rl_figure(
            record,
            "entropy",
            "Entropy of the policy",
            "nats per token",
            "Near zero, the policy has stopped trying alternatives.",
        ),
        _rl_figure(
            record,
            "live_groups",
            "Live groups",
            "share of prompts",
            "Prompts whose responses did not all get the same reward. Only these teach anything.",
            (0, 1),
        ),
    ]
    names = dict.fromkeys(
        name for key in RL_KEYS if key in record.metrics for name in record.metrics[key].inner_names("reward_by_task")
    )
    tasks = [
        _rl_figure(record, "reward_by_task", f"Reward on {name}", "mean reward", "", (0, 1), inner=name)
        for name in names
    ]
    rows = [
        (f"{name}: {row[0]}", *row[1:])
        for name, figure in zip(names, tasks, strict=True)
        if figure.table
        for row in figure.table.rows
    ]
    return overall, [replace(figure, table=None) for figure in tasks], curve_table(rows, "Reward by task family")


def curve_row(label: str, steps: list[float], values: list[float], shown: Format) -> tuple[str, ...]:
    """Sums a curve up in a row of a table: values at five places, and the extremes.

    Args:
        label: Name of the curve.
        steps: Its steps.
        values: Its values as recorded; NaN is shown as what it is.
        shown: Formats a value.
    """
    five = [curves.thin(len(values), 5)[place] for place in range(5)] if len(values) >= 5 else []
    at = [shown(values[place]) if math.isfinite(values[place]) else "NaN" for place in five] or ["–"] * 5
    if not five and values:
        at[0], at[-1] = (shown(value) if math.isfinite(value) else "NaN" for value in (values[0], values[-1]))
    finite = [value for value in values if math.isfinite(value)]
    ends = [shown(min(finite)), shown(max(finite))] if finite else [NOT_MEASURED] * 2
    first = f"{whole(steps[0])} to {whole(steps[-1])}" if steps else NOT_MEASURED
    return (label, first, whole(len(values)), *at, *ends)


def curve_table(rows: Sequence[Sequence[str]], caption: str) -> Table:
    """Puts rows of `curve_row` under their headings."""
    columns = ("curve", "steps", "points", "first", "at ¼", "at ½", "at ¾", "last", "lowest", "highest")
    return Table(columns, rows, caption)


def _rl_figure(
    record: Record,
    key: str,
    title: str,
    y_label: str,
    caption: str,
    y_range: tuple[float, float] | None = None,
    inner: str | None = None,
) -> Figure:
    series, rows = [], []
    for run in RL_KEYS:
        if run not in record.metrics:
            continue
        one = stage(run)
        steps, values = record.metrics[run].series(key, inner)
        if not steps:
            record.missing(f"{one.label}: {title.lower()} during RL")
            continue
        series.append(Series(one.label, one.style, steps, values))
        rows.append(curve_row(one.label, steps, values, significant))
    # Rewards are usually shares; a reward function that pays more than 1 must not be cut off at the frame.
    known = [value for one in series for value in one.y if math.isfinite(value)]
    fits = y_range is not None and all(y_range[0] <= value <= y_range[1] for value in known)
    small = inner is not None
    svg = charts.line_chart(
        series,
        title=title,
        x_label="RL step",
        y_label=y_label,
        y_format=significant,
        y_range=y_range if fits else None,
        width=340 if small else 440,
        height=190 if small else 225,
    )
    return Figure(title, svg, caption, curve_table(rows, title))
