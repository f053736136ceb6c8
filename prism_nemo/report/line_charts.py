"""Line charts over steps: the line, its range, a legend, and tooltips that need no JavaScript."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from prism_nemo.report import curves
from prism_nemo.report.formatting import Format, clean, decimal
from prism_nemo.report.svg import (
    CHARACTER,
    Scale,
    Style,
    element,
    mark,
    nothing,
    picture,
    span,
    text,
    tick_label,
    ticks,
)


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
