"""The charts of the page: pure functions from numbers to an SVG picture.

Each one draws something sensible for no data, one point, constant data and NaN, and gives every mark a `<title>`, which
browsers show as a tooltip without any JavaScript.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from prism_nemo.report import curves
from prism_nemo.report.formatting import NOT_MEASURED, clean, decimal
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

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line of a line chart; with `points` only marks are drawn, for something measured now and then.

    With `low` and `high`, `y` are means of windows already (see `curves.condense`), and the two hold the values of
    each window.
    """

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    points: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()


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


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_format: Format = decimal,
    y_range: tuple[float, float] | None = None,
    width: float = 440,
    height: float = 230,
) -> Markup:
    """Draws curves over steps: the smoothed line, the range of what it was smoothed from, and a legend.

    Args:
        series: The lines; a value that is NaN leaves a gap, a series without finite values is left out.
        title: Short name.
        x_label: Name and unit of the horizontal axis.
        y_label: Name and unit of the vertical axis, written above it.
        y_format: Formats a value for the tooltip.
        y_range: Fixed range of the vertical axis; by default that of the data.
        width: Width of the drawing.
        height: Height without the legend.
    """
    drawn = [one for one in series if any(math.isfinite(value) for value in one.y)]
    if not drawn:
        return nothing(width, title)
    legend, legend_height = _legend(drawn, width)
    top, bottom = legend_height + 30.0, legend_height + height - 40.0
    finite_x = [px for one in drawn for px, py in zip(one.x, one.y, strict=True) if math.isfinite(py)]
    across = Scale(*span(finite_x, pad=0.01), 52.0, width - 14.0)
    up = Scale(*(y_range or span([value for one in drawn for value in (*one.y, *one.low, *one.high)])), bottom, top)
    # page.js reads the data attributes: the part of the drawing that zooms, and the name of each line.
    plot = element(
        "g",
        *(_line(one, across, up) for one in drawn),
        _hover(drawn, across, up, y_format),
        class_="plot",
        data_x=f"{across.low:.9g} {across.high:.9g} {across.start:g} {across.end:g}",
        data_y=f"{up.end:g} {up.start:g}",
    )
    return picture(
        width,
        legend_height + height,
        title,
        f"{title}. " + " ".join(_in_words(one, y_format) for one in drawn),
        legend,
        text(y_label, 4, legend_height + 16, "axis-name"),
        _grid(across, up),
        text(x_label, (across.start + across.end) / 2, legend_height + height - 6, "axis-name", "middle"),
        plot,
    )


def interval_rows(
    rows: Sequence[Estimate],
    *,
    title: str,
    value_format: Format,
    x_range: tuple[float, float] | None = None,
    tick_format: Format | None = None,
    reference: float | None = None,
    width: float = 340,
) -> Markup:
    """Draws one row per estimate: filled mark with its interval as a whisker, hollow mark for the second value.

    Args:
        rows: The estimates; one without a value says "not measured".
        title: Short name.
        value_format: Formats a value for the label on the right and the tooltip.
        x_range: Fixed range of the axis; by default that of the data.
        tick_format: Formats the ticks; by default like plain numbers.
        reference: Draws a dashed vertical line there, to compare with.
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
    if reference is not None:
        x = across(reference)
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


def _legend(series: Sequence[Series], width: float) -> tuple[Markup, float]:
    parts, x, y = [], 4.0, 14.0
    lines = {one.style for one in series if not one.points}
    for one in series:
        # Marks on a line of the same stage explain themselves in the caption; a second entry would be clutter.
        if one.points and one.style in lines:
            continue
        wide = 34 + CHARACTER * len(one.label) + 16
        if x + wide > width and x > 4:
            x, y = 4.0, y + 20
        dash = one.style.dash or None
        sample = element("path", d=f"M{x:.1f} {y - 4:.1f}h24", class_="line", stroke_dasharray=dash)
        sample += mark(one.style, x + 12, y - 4, 3.6)
        parts.append(element("g", sample, class_=one.style.css))
        parts.append(text(one.label, x + 30, y, "label"))
        x += wide
    return Markup("").join(parts), y + 8


def _grid(across: Scale, up: Scale) -> Markup:
    parts = []
    sides = ticks(up.low, up.high, 4)
    step = sides[1] - sides[0] if len(sides) > 1 else abs(up.high - up.low)
    for value in sides:
        parts.append(element("line", x1=across.start, x2=across.end, y1=up(value), y2=up(value), class_="gridline"))
        parts.append(text(tick_label(value, step), across.start - 8, up(value) + 4, "tick", "end"))
    feet = ticks(across.low, across.high, 6)
    step = feet[1] - feet[0] if len(feet) > 1 else abs(across.high - across.low)
    for value in feet:
        parts.append(text(tick_label(value, step), across(value), up.start + 18, "tick x-tick", "middle"))
    return Markup("").join(parts)


def _line(one: Series, across: Scale, up: Scale) -> Markup:
    parts: list[Markup] = []
    if one.points:
        marks = [pair for pair in zip(one.x, one.y, strict=True) if math.isfinite(pair[1])]
        parts = [mark(one.style, across(marks[i][0]), up(marks[i][1]), 3.6, True) for i in curves.thin(len(marks), 60)]
        return element("g", *parts, class_=one.style.css, data_name=clean(one.label))
    half = 0 if one.low else curves.window(sum(math.isfinite(value) for value in one.y))
    ends: list[Markup] = []
    for x, y, low, high in curves.pieces(one.x, one.y, one.low, one.high):
        points = [curves.Point(*point) for point in zip(x, y, low, high, strict=True)] if low else []
        points = points or curves.smooth(x, y, half)
        path = "M" + "L".join(f"{across(point.x):.1f} {up(point.mean):.1f}" for point in points)
        if (half or one.low) and len(points) > 1:
            there = [f"{across(point.x):.1f} {up(point.high):.1f}" for point in points]
            back = [f"{across(point.x):.1f} {up(point.low):.1f}" for point in reversed(points)]
            parts.append(element("path", d="M" + "L".join(there + back) + "Z", class_="band"))
        if len(points) > 1:
            parts.append(element("path", d=path, class_="line", stroke_dasharray=one.style.dash or None))
        else:
            ends.append(mark(one.style, across(points[0].x), up(points[0].mean), 3.6))
        last = points[-1]
        ends = [*ends[-20:], mark(one.style, across(last.x), up(last.mean), 3.6)]
    return element("g", *parts, *ends, class_=one.style.css, data_name=clean(one.label))


def _hover(series: Sequence[Series], across: Scale, up: Scale, y_format: Format) -> Markup:
    """Draws invisible strips over the chart; each has the values under it as its tooltip."""
    # Not more strips than places with a value, or the tooltip would flicker between them.
    count = max(1, min(80, len({x for one in series for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)})))
    found: list[dict[str, tuple[float, float]]] = [{} for _ in range(count)]
    for one in series:
        for x, y in zip(one.x, one.y, strict=True):
            if math.isfinite(y):
                share = (across(x) - across.start) / (across.end - across.start)
                found[min(count - 1, int(share * count))][one.label] = (x, y)
    wide = (across.end - across.start) / count
    parts = []
    for place, values in enumerate(found):
        if values:
            lines = [f"{label}: {y_format(y)} at step {x:,.0f}" for label, (x, y) in values.items()]
            strip = element("title", "\n".join(lines))
            x = across.start + wide * place
            parts.append(element("rect", strip, x=x, y=up.end, width=wide, height=up.start - up.end, class_="hit"))
    return element("g", *parts)


def _in_words(one: Series, y_format: Format) -> str:
    finite = [value for value in one.y if math.isfinite(value)]
    if len(finite) == 1:
        return f"{one.label}: {y_format(finite[0])} at its only point."
    return f"{one.label}: from {y_format(finite[0])} to {y_format(finite[-1])} over {len(finite)} points."


def _estimate(row: Estimate, across: Scale, top: float, width: float, value_format: Format) -> Markup:
    name = text(shorten(row.label, width - 90), 8, top + 15, "label boxed")
    if row.value is None:
        return name + text(NOT_MEASURED, width - 8, top + 15, "muted boxed", "end")
    y, second_y = top + 27, top + 38
    parts = [element("line", x1=across.start, x2=across.end, y1=y, y2=y, class_="track")]
    if row.low is not None and row.high is not None:
        left, right = across(row.low), across(row.high)
        path = f"M{left:.1f} {y - 5:.1f}v10M{left:.1f} {y:.1f}H{right:.1f}M{right:.1f} {y - 5:.1f}v10"
        parts.append(element("path", d=path, class_="whisker"))
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
