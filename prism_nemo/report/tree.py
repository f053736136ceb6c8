"""Any lineage as a picture: a place for each model of a chain, a tree, or branches that were merged again."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from prism_nemo.report.formatting import clean
from prism_nemo.report.svg import Style, arrowhead, element, mark, picture, shorten, text

_WIDE, _HIGH, _ACROSS, _DOWN = 204.0, 92.0, 272.0, 138.0


def lay_out(parents: list[list[int]]) -> list[tuple[int, int]]:
    """Column and row of each model: a child stands right of its first parent, its siblings below it.

    Args:
        parents: Of each model the places of those that it was made from, which come before it.
    """
    children: dict[int | None, list[int]] = {}
    for child, above in enumerate(parents):
        children.setdefault(above[0] if above else None, []).append(child)
    columns = [0] * len(parents)
    for child, above in enumerate(parents):
        columns[child] = 1 + max((columns[parent] for parent in above), default=-1)
    rows = [0] * len(parents)
    free = 0
    # The longest line of descent goes straight on; shorter branches hang below it.
    depth = [0] * len(parents)
    for child in reversed(range(len(parents))):
        if parents[child]:
            depth[parents[child][0]] = max(depth[parents[child][0]], depth[child] + 1)
    waiting: list[tuple[int, int | None]] = [
        (child, None) for child in sorted(children.get(None, []), key=lambda one: -depth[one])[::-1]
    ]
    while waiting:
        place, row = waiting.pop()
        rows[place] = free if row is None else row
        free = max(free, rows[place] + 1)
        below = sorted(children.get(place, []), key=lambda one: -depth[one])
        waiting += [(one, rows[place] if number == 0 else None) for number, one in enumerate(below)][::-1]
    return list(zip(columns, rows, strict=True))


def draw(names: list[str], lines: Sequence[tuple[str, ...]], styles: list[Style], parents: list[list[int]]) -> Markup:
    """Draws models as boxes, and what was made from what as arrows.

    Args:
        names: Of the models.
        lines: Up to three lines about each.
        styles: Their marks and colours.
        parents: See `lay_out`.
    """
    places = lay_out(parents)
    width = 8 + _WIDE + _ACROSS * max((column for column, _ in places), default=0)
    height = 30 + _HIGH + _DOWN * max((row for _, row in places), default=0)
    edges = [
        _edge(places[parent], places[child], number > 0)
        for child, above in enumerate(parents)
        for number, parent in enumerate(above)
    ]
    boxes = [_box(*places[i], names[i], lines[i], styles[i]) for i in range(len(names))]
    said = ". ".join(
        f"{names[i]}: {', '.join(lines[i])}"
        + (f"; from {' and '.join(names[parent] for parent in parents[i])}" if parents[i] else "")
        for i in range(len(names))
    )
    return picture(max(width, 460), height, "Where each model comes from", said, arrowhead(), *edges, *boxes)


def _corner(place: tuple[int, int]) -> tuple[float, float]:
    return 4 + _ACROSS * place[0], 4 + _DOWN * place[1]


def _box(column: int, row: int, name: str, lines: tuple[str, ...], style: Style) -> Markup:
    x, y = _corner((column, row))
    parts = [
        element("title", clean(name, 300)),
        element("rect", x=x, y=y, width=_WIDE, height=_HIGH, rx=10.0, class_="node"),
        element("path", d=f"M{x + 10:.0f} {y + _HIGH:.0f}H{x + _WIDE - 10:.0f}", class_="node-foot"),
        mark(style, x + 16, y + 20, 5.0),
        text(shorten(name, _WIDE - 42), x + 29, y + 25, "node-name"),
    ]
    parts += [text(shorten(line, _WIDE - 18), x + 12, y + 46 + 16 * i, "muted") for i, line in enumerate(lines[:3])]
    return element("g", *parts, class_=style.css)


def _edge(source: tuple[int, int], target: tuple[int, int], second: bool) -> Markup:
    (x, y), (tx, ty) = _corner(source), _corner(target)
    if source[1] == target[1] and not second:
        path = f"M{x + _WIDE:.0f} {y + _HIGH / 2:.0f}H{tx - 3:.0f}"
    elif target[1] > source[1]:
        # Down below the source, along between the rows, and into the target from above.
        left, right, between = x + _WIDE - 40, tx + _WIDE / 2, ty - 24
        path = f"M{left:.0f} {y + _HIGH:.0f}V{between - 10:.0f}q0 10 10 10H{right - 10:.0f}q10 0 10 10V{ty - 3:.0f}"
    else:
        # A second parent: below its row, then up into the target, so that no box in between is crossed.
        left, right, foot = x + _WIDE - 60, tx + _WIDE / 2, y + _HIGH + 18
        path = f"M{left:.0f} {y + _HIGH:.0f}V{foot - 8:.0f}q0 8 8 8H{right - 8:.0f}q8 0 8 -8V{ty + _HIGH + 3:.0f}"
    return element("path", d=path, class_="arrow", marker_end="url(#arrow)", stroke_dasharray="5 4" if second else None)
