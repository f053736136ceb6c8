"""Tidy rows with intervals as figures: one for each measure, a row for each model or point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from prism_nemo.report.charts import Estimate, interval_rows
from prism_nemo.report.formatting import significant
from prism_nemo.report.svg import Style

_STYLE = Style("s-prism-rl")


def row_figures(rows: Sequence[dict[str, Any]], by: Sequence[str], caption: str) -> list[tuple[str, Markup, str]]:
    """Heading, drawing and caption of a figure for each group of rows.

    Args:
        rows: With ``value``, ``low`` and ``high`` (None where there is no interval).
        by: Keys whose values make a group and its heading; the other keys that differ within it name a row.
        caption: Of every figure.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    figures = []
    for key, members in groups.items():
        heading = ", ".join(str(part) for part in key)
        estimates = [Estimate(_name(row, by), _STYLE, row["value"], row["low"], row["high"]) for row in members]
        drawing = interval_rows(estimates, title=heading, value_format=significant, width=680)
        figures.append((heading, drawing, caption))
    return figures


def _name(row: dict[str, Any], by: Sequence[str]) -> str:
    """What tells a row from the others of its group."""
    if "alpha" in row:
        return f"alpha {row['alpha']:.2f}, beta {row['beta']:.2f}"
    return ", ".join(str(row[key]) for key in ("model", "pair") if key in row and key not in by)
