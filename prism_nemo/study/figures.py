"""The figures of the study's page: each an SVG that stands alone, drawn by the report's charts."""

from __future__ import annotations

from collections.abc import Sequence

from prism_nemo.report.charts import Estimate, interval_rows
from prism_nemo.report.standalone import standalone_svg
from prism_nemo.report.svg import Style
from prism_nemo.study.claims import mean_of_tasks
from prism_nemo.study.effects import Effect, effect
from prism_nemo.study.plan import Cell, plan
from prism_nemo.study.tidy import Table
from prism_nemo.study.verdicts import Claim

_BASE, _MIDTRAINED, _RL, _CONTROL = (
    Style("s-base", "circle"), Style("s-midtrained", "square"), Style("s-prism-rl", "star"),
    Style("s-base-rl", "triangle"),
)  # fmt: skip
_STYLES = (_BASE, _MIDTRAINED, _RL, _CONTROL)
_WIDTH = 760


def models() -> list[Cell]:
    """The cells of one family that have a model, in the order of the plan."""
    return [cell for cell in plan(seeds=1) if cell.has_model and cell.family == "llama"]


def claim_figure(table: Table, claim: Claim) -> str:
    """Each effect of a claim, of all families and of each, with its interval over seeds."""
    rows = []
    by_family = [
        (family or "all", [bound for bound in claim.bounds(table, family) if not bound.told])
        for family in (None, *table.families)
    ]
    for number, bound in enumerate(by_family[0][1]):
        for family, bounds in by_family:
            rows.append(_row(f"{bound.label} ({family})", _STYLES[number % len(_STYLES)], bounds[number].effect))
    # The axis is that of the means: an interval of two seeds may be ten times as wide, and would hide them.
    means = [row.value for row in rows if row.value is not None]
    reach = None
    if means and claim.key != "cka":
        pad = max(0.02, 0.6 * (max(means) - min(means)))
        reach = (min(*means, 0.0) - pad, max(*means, 0.0) + pad)
    return _drawn(rows, claim.text, 4 if claim.key == "cka" else 3, reach, None if claim.key == "cka" else 0.0)


def accuracy_figure(table: Table) -> str:
    """Mean accuracy over tasks of every cell, all families."""
    rows = [
        _row(cell.name, _style(cell), effect(table, mean_of_tasks(table, cell.name, "accuracy"))) for cell in models()
    ]
    return _drawn(rows, "Accuracy of every cell, mean of three tasks", 3, (0.0, 1.0), None)


def _style(cell: Cell) -> Style:
    if cell.kind == "base":
        return _BASE
    if cell.control != "none" or cell.factor != 1 or cell.other_seed or cell.rl_rate or cell.longer:
        return _CONTROL
    return _MIDTRAINED if cell.kind == "midtrain" else _RL


def _row(label: str, style: Style, e: Effect | None) -> Estimate:
    known = e is not None and e.spread is not None
    low, high = (e.low, e.high) if e is not None and known else (None, None)
    return Estimate(label, style, None if e is None else e.mean, low, high)


def _drawn(
    rows: Sequence[Estimate], title: str, digits: int, reach: tuple[float, float] | None, reference: float | None
) -> str:
    return standalone_svg(interval_rows(
        rows, title=title, value_format=lambda value: f"{value:.{digits}f}", x_range=reach, reference=reference,
        width=_WIDTH,
    ))  # fmt: skip
