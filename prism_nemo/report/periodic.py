"""Small evaluations while a stage trains (`evaluation.every`): a curve for each task and each held-out source.

Their values are in the run's metrics. One that a process of its own made and that was not taken over before the run
ended is read from RUN/evaluations (see `prism_nemo.evaluation.in_training`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from prism_nemo.report import curves
from prism_nemo.report.find import Run
from prism_nemo.report.formatting import NOT_MEASURED, decimal, interval, percent
from prism_nemo.report.line_charts import Series, line_chart
from prism_nemo.report.model import Model
from prism_nemo.report.read import number
from prism_nemo.report.story import Story
from prism_nemo.report.view import Figure, Table
from prism_nemo.status.files import read_json

FOLDER = "evaluations"
_PREFIX = "eval/"
_MOST = 24  # figures of a kind
_MOST_ROWS = 24  # of a run in a table


@dataclass(frozen=True)
class _Asked:
    """What one run's evaluations found: by the name of the value (without `eval/`) and the step."""

    model: Model
    values: dict[str, dict[float, float]]

    def at(self, name: str, step: float) -> float | None:
        """A value, or None where it was not measured."""
        return number(self.values.get(name, {}).get(step))


def read(run: Run) -> dict[str, dict[float, float]]:
    """The values of a run's small evaluations.

    Args:
        run: Its metrics, and its folder of evaluations for steps that the metrics do not have.

    Returns:
        By name (such as `accuracy/sums`) and step; NaN where a value was not finite.
    """
    values: dict[str, dict[float, float]] = {}
    for name in run.metrics.names(_PREFIX) if run.metrics is not None else []:
        steps, found = run.series(name)
        values[name.removeprefix(_PREFIX)] = dict(zip(steps.tolist(), found.tolist(), strict=True))
    logged = {step for found in values.values() for step in found}
    for path in sorted((run.path / FOLDER).glob("step_*.json")):
        step = re.fullmatch(r"step_(\d{1,15})", path.stem)
        if step is None or float(step[1]) in logged:
            continue
        for name, value in read_json(path).items():
            if name.startswith(_PREFIX) and (known := number(value)) is not None:
                values.setdefault(name.removeprefix(_PREFIX), {})[float(step[1])] = known
    return values


def figures(story: Story) -> list[Figure]:
    """Draws accuracy with its interval for each task, and loss for each source; a line for each run."""
    asked = [_Asked(model, values) for model, run in story.runs if (values := read(run))]
    found = []
    for kind in ("accuracy", "loss"):
        names = list(dict.fromkeys(name for one in asked for name in one.values if name.startswith(f"{kind}/")))
        if len(names) > _MOST:
            story.warnings.append(f"{len(names) - _MOST} curves of {kind} while training are not drawn.")
        found += [_figure(kind, name.removeprefix(f"{kind}/"), asked) for name in names[:_MOST]]
    return found


def _figure(kind: str, name: str, asked: list[_Asked]) -> Figure:
    accuracy = kind == "accuracy"
    shown = percent if accuracy else decimal
    series, rows = [], []
    for one in asked:
        points = sorted(one.values.get(f"{kind}/{name}", {}).items())
        if not any(math.isfinite(value) for _, value in points):
            continue
        x, y = [step for step, _ in points], [value for _, value in points]
        ends = [(one.at(f"accuracy_low/{name}", step), one.at(f"accuracy_high/{name}", step)) for step in x]
        # Where no interval was measured the band has no width. Without any band the line would be smoothed, and a curve
        # of few evaluations must show each of them.
        low = [value if end is None else end for value, (end, _) in zip(y, ends, strict=True)]
        high = [value if end is None else end for value, (_, end) in zip(y, ends, strict=True)]
        label, style = one.model.name, one.model.style
        series.append(Series(label, style, x, y, low=low, high=high))
        series.append(Series(label, style, x, y, points=True))
        for place in curves.thin(len(x), _MOST_ROWS):
            row: tuple[str, ...] = (f"{label} at step {x[place]:,.0f}", shown(y[place]))
            if accuracy:
                form, length = (one.at(f"{key}/{name}", x[place]) for key in ("form", "length"))
                row += (interval(*ends[place]), percent(form), decimal(length, 1))
            rows.append(row)
    title = f"{name} while training" if accuracy else f"Loss on {name} while training"
    svg = line_chart(
        series,
        title=title,
        x_label="optimizer step",
        y_label="share of right answers" if accuracy else "nats per token",
        y_format=shown,
        y_range=(0.0, 1.0) if accuracy and _within(series) else None,
    )
    caption = (
        "On questions of the validation split, the same at every step; the band is the 95% interval. For choosing, not "
        "for reporting."
        if accuracy
        else "On held-out text. No interval was measured."
    )
    columns = (
        ("run and step", "right", "95% interval", "in the form", "tokens") if accuracy else ("run and step", "loss")
    )
    return Figure(title, svg, caption, Table(columns, rows or [(name, *[NOT_MEASURED] * (len(columns) - 1))], title))


def _within(series: list[Series]) -> bool:
    return all(0 <= value <= 1 for one in series for value in one.y if math.isfinite(value))
