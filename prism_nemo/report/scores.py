"""The parts about results: what each model scores, and what it lost against its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prism_nemo.report import charts
from prism_nemo.report.formatting import NOT_MEASURED, decimal, interval, percent, signed, whole
from prism_nemo.report.model import Model
from prism_nemo.report.read import mapping, number, objects, sequence, share, words
from prism_nemo.report.story import Story
from prism_nemo.report.svg import Style
from prism_nemo.report.view import Figure, Table

_EVAL = "prism-nemo eval CHECKPOINT --suite SUITE --out FOLDER"
_RETENTION = "prism-nemo retention BASE_EVALUATION MODEL_EVALUATION ... --out FOLDER"
_GREEDY = ("greedy", "95% interval", "in the form", "tokens")
_VERDICTS = {
    "lost": Style("s-base-rl", "triangle"),
    "gained": Style("s-prism-rl", "star"),
    "kept": Style("s-midtrained", "square"),
}


@dataclass(frozen=True)
class _Scored:
    label: str
    style: Style
    content: dict[str, Any]


def score_figures(story: Story) -> tuple[list[Figure], list[Figure]]:
    """Draws for each suite the average and every task, a row for each model.

    Returns:
        The averages and the tasks.
    """
    suites: dict[tuple[str, str], list[_Scored]] = {}
    for model in story.models:
        # An export has the weights, and so the scores, of the checkpoint that it was made from.
        exported = model.role == "hf" and any(story.models[parent].evaluations for parent in model.parents)
        if not model.evaluations and not exported:
            story.missing(f"{model.name}: scores", _EVAL)
        for step, content in model.evaluations:
            key = words(content.get("suite")), words(content.get("split"))
            suites.setdefault(key, []).append(_Scored(_label(model, step), model.style, content))
    averages, tasks = [], []
    for (suite, split), scored in suites.items():
        name = f"{suite} ({split})"
        _compare_settings(story, name, scored)
        # Of validation answers checkpoints are chosen: a reader must not take them for a result.
        where = "" if split == "test" else f" On the {split} split, which is for choosing, not for reporting."
        averages += _averages(name, scored, where)
        tasks += _tasks(name, scored, where)
    return averages, tasks


def _label(model: Model, step: int | None) -> str:
    several = len({at for at, _ in model.evaluations}) > 1
    return f"{model.name}, step {step:,}" if several and step is not None else model.name


def _compare_settings(story: Story, suite: str, scored: list[_Scored]) -> None:
    """Scores of other questions or other settings beside one another would compare nothing."""
    found: dict[str, set[str]] = {}
    for one in scored:
        settings = mapping(one.content.get("settings"))
        for key in ("questions", "samples", "temperature", "top_p", "max_new_tokens", "seed", "engine", "formats"):
            found.setdefault(key, set()).add(words(settings.get(key)))
        for task, about in mapping(settings.get("tasks")).items():
            found.setdefault(f"questions of {task}", set()).add(words(mapping(about).get("questions")))
            found.setdefault(f"prompt format of {task}", set()).add(words(mapping(about).get("formats")))
    different = [key for key, values in found.items() if len(values) > 1]
    if different:
        story.warnings.append(f"Suite {suite}: the models were not asked alike ({', '.join(different[:6])} differ).")
    for one in scored:
        for mark in sequence(one.content.get("marks")):
            story.warnings.append(f"{one.label}, suite {suite}: {words(mark)}")


def _averages(suite: str, scored: list[_Scored], where: str) -> list[Figure]:
    figures = []
    for key, title in (("domain_weighted", "mean of the domains"), ("plain_mean", "plain mean of the tasks")):
        rows, estimates, over = [], [], set()
        for one in scored:
            average = mapping(mapping(one.content.get("averages")).get(key))
            value, low, high = (share(average.get(name)) for name in ("estimate", "low", "high"))
            estimates.append(charts.Estimate(one.label, one.style, value, low, high))
            groups = mapping(average.get("of"))
            over.add(", ".join(sorted({words(task) for part in groups.values() for task in sequence(part)})))
            rows.append((one.label, percent(value), interval(low, high)))
        if any(estimate.value is not None for estimate in estimates):
            svg = charts.interval_rows(
                estimates,
                title=f"{suite}: {title}",
                value_format=percent,
                x_range=(0.0, 1.0),
                tick_format=lambda value: percent(value, 0),
                width=440,
            )
            of = f" Over {over.pop()}." if len(over) == 1 else " Not every model has the same tasks; see the numbers."
            table = Table(("model", "score", "95% interval"), rows, f"{suite}: {title}")
            figures.append(Figure(f"{suite}: {title}", svg, f"With 95% intervals.{of}{where}", table))
    return figures


def _tasks(suite: str, scored: list[_Scored], where: str) -> list[Figure]:
    tasks = [mapping(one.content.get("tasks")) for one in scored]
    names = list(dict.fromkeys(name for found in tasks for name in found))
    figures = []
    for name in sorted(names, key=lambda name: words(_first(tasks, name).get("domain"))):
        about = _first(tasks, name)
        loss = about.get("higher_is_better") is False
        shown: Callable[[float], str] = decimal if loss else percent
        read = number if loss else share
        second = any("greedy" in mapping(found.get(name)) for found in tasks)
        estimates, rows, counts = [], [], set()
        for one, found in zip(scored, tasks, strict=True):
            task = mapping(found.get(name))
            value, low, high = (read(task.get(key)) for key in ("estimate", "low", "high"))
            estimates.append(charts.Estimate(one.label, one.style, value, low, high, share(task.get("greedy"))))
            if value is not None:
                counts.add(whole(number(task.get("questions"))))
            ends = f"{decimal(low)} to {decimal(high)}" if loss else interval(low, high)
            rows.append(
                (one.label, _said(value, shown), ends, whole(number(task.get("questions"))))
                + (_greedy(task) if second else ())
            )
        domain = words(about.get("domain"))
        title = f"{domain}: {name}" if domain else name
        svg = charts.interval_rows(
            estimates,
            title=f"{suite}, {title}",
            value_format=shown,
            x_range=None if loss else (0.0, 1.0),
            tick_format=None if loss else lambda value: percent(value, 0),
            reference=None if loss else share(about.get("chance")),
        )
        asked = f"{counts.pop()} questions" if len(counts) == 1 else "number of questions differs, see numbers"
        unit = "nats per token, lower is better; the axis is cut" if loss else words(about.get("metric"))
        guess = " Dashed: guessing." if not loss and share(about.get("chance")) is not None else ""
        guess += " Hollow: greedy decoding." if second else ""
        columns = ("model", "score", "95% interval", "questions", *(_GREEDY if second else ()))
        caption = f"{suite}: {unit}, {asked}.{guess}{where}"
        figures.append(Figure(title, svg, caption, Table(columns, rows, f"{suite}, {title}")))
    return figures


def retention_figures(story: Story) -> list[Figure]:
    """Draws what each model gained and lost against its base, with intervals, and counts the items behind it."""
    figures = []
    for result in story.found.of("retention"):
        base = words(result.content.get("base"))
        for model in objects(result.content.get("models")):
            lines = objects(model.get("lines"))
            for unit, name in (("share", "score"), ("", "loss on text")):
                mine = [line for line in lines if (line.get("unit") == "share") == bool(unit)]
                figure = _retention(f"{words(model.get('name'))} against {base}: {name}", mine, bool(unit))
                if figure is not None:
                    figures.append(figure)
        for mark in sequence(result.content.get("marks")):
            story.warnings.append(f"Retention against {base}: {words(mark)}")
    if not figures:
        story.missing("What was kept and what was lost, question by question (retention)", _RETENTION)
    return figures


def _retention(title: str, lines: list[dict[str, Any]], share: bool) -> Figure | None:
    def shown(value: float) -> str:
        return f"{signed(100 * value, 1)} points" if share else signed(value)

    estimates, rows = [], []
    for line in lines:
        change, low, high = (number(line.get(key)) for key in ("change", "low", "high"))
        verdict = words(line.get("verdict"))
        style = _VERDICTS.get(verdict, Style("s-other"))
        label = f"{words(line.get('name'))} · {verdict or 'no verdict'}"
        estimates.append(charts.Estimate(label, style, change, low, high))
        items = mapping(line.get("items"))
        counts = [str(len(sequence(items[key]))) if key in items else "–" for key in ("forgotten", "learned")]
        before, after = number(line.get("base")), number(line.get("model"))
        levels = [percent(one) if share else decimal(one) for one in (before, after)]
        limits = f"{shown(low)} to {shown(high)}" if low is not None and high is not None else NOT_MEASURED
        rows.append((label, *levels, _said(change, shown), limits, *counts, whole(number(line.get("questions")))))
    if not estimates:
        return None
    svg = charts.interval_rows(
        estimates,
        title=title,
        value_format=shown,
        tick_format=(lambda value: signed(100 * value, 0)) if share else None,
        reference=0.0,
        width=440,
    )
    # `retention` turns a loss around: a change above 0 is a gain in either unit.
    unit = "Points of the score" if share else "Nats per token that the loss fell"
    columns = ("task", "before", "after", "change", "95% interval", "items forgotten", "items learned", "questions")
    return Figure(
        title, svg, f"{unit}, with the 95% interval; right of the dashed line is better.", Table(columns, rows, title)
    )


def _first(tasks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((mapping(found[name]) for found in tasks if name in found), {})


def _greedy(task: dict[str, Any]) -> tuple[str, ...]:
    return (
        percent(share(task.get("greedy"))),
        interval(number(task.get("greedy_low")), number(task.get("greedy_high"))),
        percent(share(task.get("format_rate"))),
        decimal(number(task.get("mean_response_tokens")), 1),
    )


def _said(value: float | None, shown: Callable[[float], str]) -> str:
    return NOT_MEASURED if value is None else shown(value)
