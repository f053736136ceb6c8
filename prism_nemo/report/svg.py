"""The pieces that the charts are drawn from: elements, scales, ticks and marks. Text is always escaped here.

Colours are never written into the picture. Elements carry class names, and page.css gives them a colour for light,
dark and print.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from prism_nemo.report.formatting import NOT_MEASURED, clean

# Width of a character of 12 px in the widest common system font (DejaVu Sans); charts leave room for text by it.
CHARACTER = 7.0


@dataclass(frozen=True)
class Style:
    """How one series looks: CSS class for the colour, mark, and dash pattern of its line."""

    css: str
    mark: str = "circle"
    dash: str = ""


@dataclass(frozen=True)
class Scale:
    """A linear map from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Returns the pixel of a value; values outside the range are kept at its edge."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def element(name: str, *content: str, **attributes: str | float | None) -> Markup:
    """Builds one SVG element.

    Args:
        name: Tag name.
        *content: Text, which is escaped, or Markup, which is not.
        **attributes: `stroke_width` becomes `stroke-width`, `class_` becomes `class`; None leaves the attribute out.
    """
    # Joined as plain strings and marked as markup once: a page has thousands of elements.
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    inside = (part if isinstance(part, Markup) else escape(clean(part)) for part in content)
    return Markup("".join([*parts, ">", *inside, f"</{name}>"]))


def text(content: str, x: float, y: float, css: str = "", anchor: str | None = None) -> Markup:
    """Places a text, with `start`, `middle` or `end` of it at x."""
    return element("text", content, x=float(x), y=float(y), class_=css or None, text_anchor=anchor)


def arrowhead() -> Markup:
    """The head of arrows whose paths have ``marker_end="url(#arrow)"``; once in each picture."""
    return element(
        "defs",
        element(
            "marker",
            element("path", d="M0 0L8 4L0 8z", class_="arrowhead"),
            id="arrow",
            viewBox="0 0 8 8",
            refX=7.0,
            refY=4.0,
            markerWidth=8.0,
            markerHeight=8.0,
            orient="auto",
        ),
    )


def picture(width: float, height: float, title: str, description: str, *content: Markup) -> Markup:
    """Wraps a drawing as an accessible picture that scales with the page.

    Args:
        width: Width of the drawing; on a narrow screen it shrinks to 70 % of that and then scrolls, to stay readable.
        height: Height of the drawing.
        title: Short name, read out by screen readers.
        description: What the picture shows, in words and numbers.
        *content: The elements.
    """
    # <desc> for screen readers; the label carries the title, because a <title> child of the root would pop up as a
    # tooltip over every empty spot of the chart.
    return element(
        "svg",
        element("desc", description),
        *content,
        role="img",
        aria_label=clean(title),
        viewBox=f"0 0 {width:g} {height:g}",
        style=f"min-width:{0.7 * width:.0f}px;max-width:{1.25 * width:.0f}px",
    )


def nothing(width: float, title: str, height: float = 96.0) -> Markup:
    """Draws the place of a chart whose numbers are missing; low, because there is nothing to see."""
    words = text(NOT_MEASURED, width / 2, height / 2 + 4, "muted", "middle")
    frame = element("rect", x=1.0, y=1.0, width=width - 2, height=height - 2, rx=8.0, class_="empty")
    return picture(width, height, title, f"{title}: {NOT_MEASURED}.", frame, words)


def stacked(title: str, parts: Sequence[tuple[str, Markup]], width: float) -> Markup:
    """One picture of several of the same width, each under its name.

    Args:
        title: Short name of the whole.
        parts: Name and drawing (from `picture`) of each.
        width: Of each.
    """
    y, content = 0.0, []
    for name, drawing in parts:
        found = re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', str(drawing))
        height = float(found[1]) if found else 0.0
        content.append(text(shorten(name, width - 16), 8, y + 18, "group"))
        place = f'<svg x="0" y="{y + 26:g}" width="{width:g}" height="{height:g}" '
        content.append(Markup(str(drawing).replace("<svg ", place, 1)))
        y += height + 40
    return picture(width, y, title, f"{title}: {'; '.join(name for name, _ in parts)}.", *content)


def span(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    """Returns a range around the finite values that is never empty, with a little air.

    A constant series gets a range around its value, no values at all give 0 to 1.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    # Below this width a double cannot hold distinct ticks any more, and the labels would repeat.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.1 * abs(low) or 1.0
        return low - half, high + half
    return low - pad * (high - low), high + pad * (high - low)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Returns round numbers (1, 2 or 5 times a power of ten) between low and high, about as many as wanted."""
    rough = (high - low) / max(1, wanted)
    if not math.isfinite(rough) or rough <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    """Formats a tick with just the decimals that its step needs."""
    if abs(value) >= 1e5:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if step < 1e-4:
        return f"{value:.1e}" if value else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"


def mark(style: Style, x: float, y: float, size: float = 4.5, hollow: bool = False) -> Markup:
    """Draws the mark of a series at a point: filled for the main value, hollow for a second one."""
    css = "ring" if hollow else "dot"
    if style.mark == "circle":
        return element("circle", cx=float(x), cy=float(y), r=size, class_=css)
    turns: dict[str, Sequence[tuple[float, float]]] = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "triangle": [(0, -1.2), (1.2, 0.95), (-1.2, 0.95)],
        "star": [
            (radius * math.sin(math.pi * corner / 5), -radius * math.cos(math.pi * corner / 5))
            for corner, radius in enumerate([1.5, 0.68] * 5)
        ],
    }
    corners = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in turns[style.mark])
    return element("polygon", points=corners, class_=css)


def shorten(label: str, width: float) -> str:
    """Cuts a label so that it fits into a width in pixels."""
    room = max(3, int(width / CHARACTER))
    return label if len(label) <= room else label[: room - 1] + "…"
