"""The figures of the study's page: each an SVG that stands alone, drawn by the report's charts."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from prism_nemo.report.charts import Estimate, interval_rows
from prism_nemo.report.formatting import Format
from prism_nemo.report.standalone import standalone_svg
from prism_nemo.report.svg import Style, stacked
from prism_nemo.study.claims import mean_of_tasks
from prism_nemo.study.effects import Effect, effect
from prism_nemo.study.plan import Cell, plan
from prism_nemo.study.tidy import Table
from prism_nemo.study.verdicts import Bound, Claim

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
    """A part for each effect that is judged, on an axis of its own: of all families and of each, and what is asked."""
    families = claim.by_family(table)
    parts: list[tuple[str, Markup]] = []
    for number, bound in enumerate(families[None]):
        if bound.told:
            continue
        style = _STYLES[len(parts) % len(_STYLES)]
        rows = [_row(name or "all families", style, bounds[number].effect) for name, bounds in families.items()]
        drawing = interval_rows(
            rows, title=bound.label, value_format=_format(bound.digits), x_range=_reach(rows, bound),
            reference=bound.ends, width=_WIDTH,
        )  # fmt: skip
        parts.append((f"{bound.label} (asked: {bound.asked})", drawing))
    return standalone_svg(stacked(claim.text, parts, _WIDTH))


def _reach(rows: Sequence[Estimate], bound: Bound) -> tuple[float, float] | None:
    """The axis is that of means and bounds: an interval of two seeds may be ten times as wide, and would hide them."""
    places = [row.value for row in rows if row.value is not None]
    if not places:
        return None
    places += bound.ends
    pad = 0.6 * (max(places) - min(places)) or 0.02
    return min(places) - pad, max(places) + pad


def _format(digits: int) -> Format:
    return lambda value: f"{value:.{digits}f}"


def accuracy_figure(table: Table) -> str:
    """Mean accuracy over tasks of every cell, all families."""
    rows = [
        _row(cell.name, _style(cell), effect(table, mean_of_tasks(table, cell.name, "accuracy"))) for cell in models()
    ]
    title = "Accuracy of every cell, mean of three tasks"
    return standalone_svg(interval_rows(rows, title=title, value_format=_format(3), x_range=(0.0, 1.0), width=_WIDTH))


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
