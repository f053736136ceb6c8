"""The part about how the runs learned: every run of a kind in one chart, and the loss of each source by run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from prism_nemo.report import curves
from prism_nemo.report.find import Run
from prism_nemo.report.formatting import Format, decimal, percent, significant, whole
from prism_nemo.report.line_charts import Series, line_chart
from prism_nemo.report.model import SPARE, Model
from prism_nemo.report.story import Story
from prism_nemo.report.svg import Style
from prism_nemo.report.view import Figure, Table

_BAND = "Line: mean over neighbouring steps; the band holds every recorded value."
_COLUMNS = ("steps", "points", "first", "at ¼", "at ½", "at ¾", "last", "least", "greatest", "not finite")
_MOST_SOURCES = 8
_SOURCE_STYLES = (
    Style("s-midtrained", "square"), Style("s-base-rl", "triangle", "2 3"), Style("s-prism-rl", "star"),
    Style("s-longer", "diamond", "7 3"), Style("s-base", "circle"), Style("s-other", "circle", "9 2 2 2"), *SPARE
)  # fmt: skip
# Metric, title, unit, format, fixed range, and what to see in it.
_RL: tuple[tuple[str, str, str, Format, tuple[float, float] | None, str], ...] = (
    ("reward", "Reward", "mean reward", decimal, (0.0, 1.0), ""),
    ("response_length", "Response length", "tokens", lambda v: decimal(v, 1), None, ""),
    ("entropy", "Entropy", "nats per token", decimal, None, "A policy whose entropy falls to zero no longer explores."),
    ("logprob_gap", "Parity gap", "nats", significant, None,
     "Largest difference of log-probabilities between sampler and trainer."),
    ("live_groups", "Live groups", "share of groups", percent, (0.0, 1.0),
     "Groups with different rewards; the others teach nothing."),
    ("finished", "Finished responses", "share", percent, (0.0, 1.0), "The others were cut off at the length limit."),
)  # fmt: skip
_TRAINING: tuple[tuple[str, str, str, Format, tuple[float, float] | None, str], ...] = (
    ("loss", "Training loss", "nats per token", decimal, None, "Hollow marks: loss on held-out text."),
    ("grad_norm", "Gradient norm", "before clipping", significant, None, ""),
    ("tokens_per_second", "Speed", "tokens per second", whole, None, ""),
)


def training_figures(story: Story) -> tuple[list[Figure], list[Figure]]:
    """Draws mid-training: all runs in one chart for each measure, and one chart by source for each run."""
    runs = [(model, run) for model, run in story.runs if model.role in ("pretrain", "midtrain")]
    if not runs:
        story.missing("Curves of mid-training", "prism-nemo midtrain recipes/midtrain.py ...; then name its run_dir")
        return [], []
    before = _steps_before(story)
    figures = [_figure(story, runs, *measure, before=before) for measure in _TRAINING]
    return [one for one in figures if one is not None], [one for run in runs if (one := _sources(story, *run))]


def rl_figures(story: Story) -> list[Figure]:
    """Draws RL: all runs in one chart for each measure."""
    runs = [(model, run) for model, run in story.runs if model.role in ("base_rl", "prism_rl")]
    if not runs:
        story.missing("Curves of RL", "prism-nemo rl recipes/rl.py ...; then name its run_dir")
        return []
    figures = [one for measure in _RL if (one := _figure(story, runs, *measure)) is not None]
    names = list(
        dict.fromkeys(
            name for _, run in runs if run.metrics is not None for name in run.metrics.inner_names("reward_by_task")
        )
    )
    for name in names[:24]:
        about = ("reward_by_task", f"Reward: {name}", "mean reward", decimal, (0.0, 1.0), "")
        figure = _figure(story, runs, *about, inner=name)
        figures += [figure] if figure is not None else []
    return figures


def _figure(
    story: Story,
    runs: Sequence[tuple[Model, Run]],
    key: str,
    title: str,
    unit: str,
    shown: Format,
    limits: tuple[float, float] | None,
    caption: str,
    inner: str | None = None,
    before: dict[str, float] | None = None,
) -> Figure | None:
    series, rows = [], []
    for model, run in runs:
        shift = (before or {}).get(model.name, 0.0)
        one = _series(run, model.name, model.style, key, inner, shift)
        if one is None:
            story.missing(f"{model.name}: {title.lower()}", f"{key} in its metrics.jsonl")
            continue
        series.append(one)
        rows.append(_row(run, model.name, key, inner, shown))
        if (
            key == "loss"
            and (held := _series(run, model.name, model.style, "validation_loss", None, shift)) is not None
        ):
            series.append(Series(model.name, model.style, held.x, held.y, points=True))
    if not series:
        return None
    if limits is not None and any(
        not limits[0] <= value <= limits[1] for one in series for value in one.y if value == value
    ):
        limits = None  # a reward with penalties leaves 0 to 1, and nothing may be drawn at the edge that lies beyond
    along = any((before or {}).values())
    wide = key == "loss"
    svg = line_chart(
        series,
        title=title,
        x_label="optimizer step, counted along the lineage" if along else "optimizer step",
        y_label=unit,
        y_format=shown,
        y_range=limits,
        **({"width": 1000, "height": 330} if wide else {}),
    )
    told = [_BAND, caption]
    if along and wide:
        told.append(
            "Stages train on different data, so a jump between two of them is the data and not the model. The numbers "
            "count the steps within each stage."
        )
    return Figure(title, svg, " ".join(filter(None, told)), Table(("run", *_COLUMNS), rows, title), wide=wide)


def _steps_before(story: Story) -> dict[str, float]:
    """Steps of (pre- and mid-)training that came before each run, by the name of its model."""
    before, after = {}, [0.0] * len(story.models)
    for place, model in enumerate(story.models):
        if model.run is None or model.role not in ("pretrain", "midtrain"):
            continue
        steps = model.run.series("loss")[0]
        first = after[model.parents[0]] if model.parents else 0.0
        # A run that goes on counting where its parent ended needs no shift.
        shift = first if len(steps) and steps[0] <= first else 0.0
        before[model.name] = shift
        after[place] = shift + float(steps[-1]) if len(steps) else first
    return before


def _sources(story: Story, model: Model, run: Run) -> Figure | None:
    names = [name.removeprefix("loss/") for name in run.metrics.names("loss/")] if run.metrics is not None else []
    if not names:
        story.missing(f"{model.name}: loss per source", "recorded by prism-nemo midtrain for mixtures of sources")
        return None
    shown = names[:_MOST_SOURCES]
    series, rows = [], []
    for name, style in zip(names, (*_SOURCE_STYLES, *([Style("s-other")] * len(names))), strict=False):
        one = _series(run, name, style, f"loss/{name}", None)
        if one is not None:
            rows.append(_row(run, name, f"loss/{name}", None, decimal))
            if name in shown:
                series.append(one)
    title = f"Loss per source: {model.name}"
    svg = line_chart(series, title=title, x_label="optimizer step", y_label="nats per token")
    left = len(names) - len(shown)
    caption = _BAND + (f" {left} more sources are in the numbers only." if left else "")
    return Figure(title, svg, caption, Table(("source", *_COLUMNS), rows, title))


def _series(run: Run, label: str, style: Style, key: str, inner: str | None, shift: float = 0.0) -> Series | None:
    steps, values = run.series(key, inner)
    if not np.isfinite(values).any():
        return None
    x, y, low, high = curves.condense(steps + shift, values)
    return Series(label, style, x, y, low=low, high=high)


def _row(run: Run, label: str, key: str, inner: str | None, shown: Format) -> tuple[str, ...]:
    steps, values = run.series(key, inner)
    finite = values[np.isfinite(values)]
    five = [float(values[round(part * (len(values) - 1) / 4)]) for part in range(5)]
    return (
        label,
        f"{steps[0]:,.0f} to {steps[-1]:,.0f}",
        whole(len(values)),
        *("NaN" if math.isnan(value) else shown(value) for value in five),
        shown(float(finite.min())),
        shown(float(finite.max())),
        whole(len(values) - len(finite)),
    )
