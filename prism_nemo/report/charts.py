"""Charts of rows and cells: pure functions from numbers to an SVG picture; `line_charts` has those over steps.

Each one draws something sensible for no data, one point, constant data and NaN, and gives every mark a `<title>`, which
browsers show as a tooltip without any JavaScript.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from prism_nemo.report.formatting import NOT_MEASURED, Format
from prism_nemo.report.svg import (
    CHARACTER,
    Scale,
    Style,
    element,
    mark,
    nothing,
    picture,
    shorten,
    span,
    text,
    tick_label,
    ticks,
)


@dataclass(frozen=True)
class Estimate:
    """A row of an interval chart: a value, its interval, and a second value that gets a hollow mark."""

    label: str
    style: Style
    value: float | None
    low: float | None = None
    high: float | None = None
    second: float | None = None


@dataclass(frozen=True)
class Bar:
    """A horizontal bar from `start` over `value`; bars of one `group` follow each other under its name.

    A `lead` is a dashed line of that length which ends where the bar begins: what was waited for.
    """

    label: str
    style: Style
    value: float | None
    shown: str
    group: str = ""
    start: float = 0.0
    note: str = ""
    lead: float = 0.0


def interval_rows(
    rows: Sequence[Estimate],
    *,
    title: str,
    value_format: Format,
    x_range: tuple[float, float] | None = None,
    tick_format: Format | None = None,
    reference: float | Sequence[float] | None = None,
    width: float = 340,
) -> Markup:
    """Draws one row per estimate: filled mark with its interval as a whisker, hollow mark for the second value.

    Args:
        rows: The estimates; one without a value says "not measured".
        title: Short name.
        value_format: Formats a value for the label on the right and the tooltip.
        x_range: Fixed range of the axis; by default that of the data.
        tick_format: Formats the ticks; by default like plain numbers.
        reference: Draws a dashed vertical line there, or at each of them, to compare with.
        width: Width of the drawing.
    """
    known = [value for row in rows for value in (row.value, row.low, row.high, row.second) if value is not None]
    if not any(row.value is not None for row in rows):
        return nothing(width, title)
    row_height, top = 46.0, 4.0
    bottom = top + row_height * len(rows)
    low, high = x_range or span(known, pad=0.1)
    across = Scale(low, high, 8.0, width - 8)
    places = ticks(low, high, 4 if width < 400 else 6)
    step = places[1] - places[0] if len(places) > 1 else 1.0
    parts = []
    for place in places:
        x = across(place)
        parts.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_="gridline"))
        label = tick_format(place) if tick_format else tick_label(place, step)
        # The outermost labels lean inwards, or they would be cut at the edge of the drawing.
        anchor = "start" if x < 16 else "end" if x > width - 16 else "middle"
        parts.append(text(label, {"start": 0.0, "end": width}.get(anchor, x), bottom + 18, "tick", anchor))
    for place in () if reference is None else (reference,) if isinstance(reference, (int, float)) else reference:
        x = across(place)
        parts.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_="reference"))
    for place, row in enumerate(rows):
        parts.append(_estimate(row, across, top + row_height * place, width, value_format))
    description = " ".join(_estimate_in_words(row, value_format) for row in rows)
    return picture(width, bottom + 26, title, f"{title}. {description}", *parts)


def horizontal_bars(
    bars: Sequence[Bar],
    *,
    title: str,
    tick_format: Format | None = None,
    x_range: tuple[float, float] | None = None,
    labels: float = 190,
    width: float = 440,
) -> Markup:
    """Draws horizontal bars, grouped under headings; with `start` set they make a time line.

    Args:
        bars: The bars in order; one without a value says "not measured".
        title: Short name.
        tick_format: Formats the ticks; by default like plain numbers.
        x_range: Fixed range of the axis; by default from 0 to the longest bar.
        labels: Width kept for the labels on the left.
        width: Width of the drawing.
    """
    ends = [bar.start + bar.value for bar in bars if bar.value is not None and math.isfinite(bar.value)]
    if not ends:
        return nothing(width, title)
    low, high = x_range or (0.0, max(ends))
    if high <= low:
        high = low + 1.0
    across = Scale(low, high, labels + 10, width - 74)
    parts: list[Markup] = []
    y, group = 4.0, ""
    for bar in bars:
        if bar.group != group:
            group = bar.group
            parts.append(text(group, 0, y + 20, "group"))
            y += 28
        parts.append(_bar(bar, across, y, labels, width))
        y += 23
    places = ticks(low, high, max(2, min(5, int((across.end - across.start) / 38))))
    step = places[1] - places[0] if len(places) > 1 else 1.0
    grid = []
    for place in places:
        label = tick_format(place) if tick_format else tick_label(place, step)
        grid.append(element("line", x1=across(place), x2=across(place), y1=4.0, y2=y + 4, class_="gridline"))
        grid.append(text(label, across(place), y + 20, "tick", "middle"))
    description = " ".join(f"{bar.group} {bar.label}: {bar.shown}.".strip() for bar in bars)
    return picture(width, y + 28, title, f"{title}. {description}", *grid, *parts)


def heat_strip(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    columns: Sequence[str],
    *,
    title: str,
    value_format: Format,
    centre: float,
    least_reach: float,
    width: float = 1000,
) -> Markup:
    """Draws rows of cells of a colour that is the stronger the further their value lies from the centre.

    Args:
        rows: Label and values of each row; a missing value leaves a hatched cell.
        columns: Names of the columns.
        title: Short name.
        value_format: Formats a value for the cell and the tooltip.
        centre: The value of a cell without colour; above and below it the cells differ in hue.
        least_reach: The distance from the centre that gets full colour if no value lies further away. Without it,
            differences of no meaning would look dramatic.
        width: Width of the drawing.
    """
    known = [value for _, values in rows for value in values if value is not None and math.isfinite(value)]
    if not known:
        return nothing(width, title)
    reach = max(least_reach, *(abs(value - centre) for value in known))
    # Rows such as "A → B" and "A → C" must not be cut to the same text.
    wanted = max(CHARACTER * len(label) for label, _ in rows) + 18
    labels = min(250.0, max(160.0, wanted)) if width > 600 else 148.0
    cell = (width - labels - 8) / max(1, len(columns))
    parts = []
    for row, (label, values) in enumerate(rows):
        y = 4.0 + 40 * row
        parts.append(text(shorten(label, labels - 8), labels - 10, y + 22, "label", "end"))
        for column, name in enumerate(columns):
            value = values[column] if column < len(values) else None
            parts.append(_cell(value, labels + cell * column, y, cell, f"{label}, {name}", value_format, centre, reach))
    bottom = 4.0 + 40 * len(rows)
    longest = max((len(name) for name in columns), default=1) * CHARACTER + 10
    every = max(1, math.ceil(longest / cell)) if longest < 90 else 1
    for column in range(0, len(columns), every):
        name = shorten(columns[column], cell) if every == 1 else columns[column]
        parts.append(text(name, labels + cell * (column + 0.5), bottom + 14, "tick", "middle"))
    description = " ".join(
        f"{label}: " + ", ".join(NOT_MEASURED if value is None else value_format(value) for value in values) + "."
        for label, values in rows
    )
    return picture(width, bottom + 24, title, f"{title}. {description}", *parts)


def _estimate(row: Estimate, across: Scale, top: float, width: float, value_format: Format) -> Markup:
    name = text(shorten(row.label, width - 90), 8, top + 15, "label boxed")
    if row.value is None:
        return name + text(NOT_MEASURED, width - 8, top + 15, "muted boxed", "end")
    y, second_y = top + 27, top + 38
    parts = [element("line", x1=across.start, x2=across.end, y1=y, y2=y, class_="track")]
    if row.low is not None and row.high is not None:
        left, right = across(row.low), across(row.high)
        # A cap where the interval ends; an arrow where only the drawing does.
        ends = [
            f"M{x + 6 * inwards:.1f} {y - 5:.1f}L{x:.1f} {y:.1f}L{x + 6 * inwards:.1f} {y + 5:.1f}"
            if cut
            else f"M{x:.1f} {y - 5:.1f}v10"
            for x, inwards, cut in ((left, 1, row.low < across.low), (right, -1, row.high > across.high))
        ]
        parts.append(element("path", d=f"{''.join(ends)}M{left:.1f} {y:.1f}H{right:.1f}", class_="whisker"))
    parts.append(mark(row.style, across(row.value), y))
    if row.second is not None:
        parts.append(mark(row.style, across(row.second), second_y, 3.6, True))
    strip = element("rect", x=0.0, y=top + 1, width=width, height=45.0, class_="hit")
    title = element("title", _estimate_in_words(row, value_format))
    value = text(value_format(row.value), width - 8, top + 15, "value boxed", "end")
    return element("g", title, strip, *parts, name, value, class_=row.style.css)


def _estimate_in_words(row: Estimate, value_format: Format) -> str:
    if row.value is None:
        return f"{row.label}: {NOT_MEASURED}."
    said = f"{row.label}: {value_format(row.value)}"
    if row.low is not None and row.high is not None:
        said += f" (95% interval {value_format(row.low)} to {value_format(row.high)})"
    if row.second is not None:
        said += f", greedy {value_format(row.second)}"
    return said + "."


def _bar(bar: Bar, across: Scale, y: float, labels: float, width: float) -> Markup:
    label = text(shorten(bar.label, labels), labels, y + 15, "label", "end")
    if bar.value is None or not math.isfinite(bar.value):
        return label + text(NOT_MEASURED, across.start, y + 15, "muted")
    left, right = across(bar.start), across(bar.start + bar.value)
    # A bar of a fraction of a pixel would be invisible, and nothing is not the same as little.
    shape = element("rect", x=left, y=y + 3, width=max(1.5, right - left), height=16.0, rx=2.5, class_="bar")
    room = CHARACTER * len(bar.shown) + 8
    outside = right + 6 + room < width or left < across.start + room
    value = text(bar.shown, right + 6 if outside else left - 6, y + 15, "value", None if outside else "end")
    said = f"{bar.group} {bar.label}: {bar.shown}".strip() + (f"\n{bar.note}" if bar.note else "")
    strip = element("rect", x=0.0, y=y, width=width, height=22.0, class_="hit")
    lead = Markup("")
    if bar.lead > 0:
        lead = element("line", x1=across(bar.start - bar.lead), x2=left, y1=y + 11, y2=y + 11, class_="reference")
    return element("g", element("title", said), strip, lead, label, shape, value, class_=bar.style.css)


def _cell(
    value: float | None, x: float, y: float, wide: float, name: str, value_format: Format, centre: float, reach: float
) -> Markup:
    known = value is not None and math.isfinite(value)
    shown = value_format(value) if value is not None and known else NOT_MEASURED
    title = element("title", f"{name}: {shown}")
    gap = 2.0 if wide > 12 else 0.5
    box = {"x": x, "y": y, "width": max(0.5, wide - gap), "height": 36.0, "rx": 3.0 if wide > 12 else 0.0}
    if value is None or not known:
        return element("g", title, element("rect", class_="empty", **box))
    strength = abs(value - centre) / reach
    css = "heat above" if value > centre else "heat below"
    back = element("rect", class_="cell", **box)
    parts = [title, back, element("rect", class_=css, fill_opacity=round(strength, 3), **box)]
    if len(shown) * CHARACTER + 4 < wide:
        ink = "on-dark" if strength > 0.55 else "on-light"
        parts.append(text(shown, x + (wide - gap) / 2, y + 22, ink, "middle"))
    return element("g", *parts)
