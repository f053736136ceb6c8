"""The picture of where each checkpoint comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from prism_nemo.report.svg import Style, arrowhead, element, mark, picture, shorten, text

WIDE, HIGH = 184.0, 76.0
COLUMNS = (2.0, 273.0, 544.0, 814.0)
ROWS = (6.0, 152.0)


@dataclass(frozen=True)
class Node:
    """One checkpoint: its place in the picture (column 0 to 3, row 0 or 1), name and up to two lines about it."""

    label: str
    style: Style
    column: int
    row: int
    lines: tuple[str, ...]
    present: bool


@dataclass(frozen=True)
class Edge:
    """One stage of training, or the export: from node to node by index, with up to two lines of text."""

    source: int
    target: int
    lines: tuple[str, ...]


def draw(nodes: Sequence[Node], edges: Sequence[Edge]) -> Markup:
    """Draws checkpoints as boxes and stages as arrows between them.

    Args:
        nodes: The checkpoints; one that does not exist is drawn with a dashed frame.
        edges: The stages; one between rows runs below its source and enters its target from above.
    """
    said = ". ".join(
        f"{nodes[edge.source].label} to {nodes[edge.target].label}: {', '.join(edge.lines)}" for edge in edges
    )
    return picture(
        1000,
        238,
        "Where each checkpoint comes from",
        said,
        arrowhead(),
        *(_edge(nodes[edge.source], nodes[edge.target], edge.lines) for edge in edges),
        *(_node(node) for node in nodes),
    )


def _node(node: Node) -> Markup:
    x, y = COLUMNS[node.column], ROWS[node.row]
    parts = [
        element("rect", x=x, y=y, width=WIDE, height=HIGH, rx=10.0, class_="node" if node.present else "node absent"),
        element("path", d=f"M{x + 10:.0f} {y + HIGH:.0f}H{x + WIDE - 10:.0f}", class_="node-foot"),
        mark(node.style, x + 16, y + 21.5, 5.0, hollow=not node.present),
        text(shorten(node.label, WIDE - 42), x + 29, y + 26, "node-name"),
    ]
    for place, line in enumerate(node.lines[:2]):
        parts.append(text(shorten(line, WIDE - 20), x + 13, y + 47 + 16 * place, "muted"))
    return element("g", *parts, class_=node.style.css)


def _edge(source: Node, target: Node, lines: Sequence[str]) -> Markup:
    if source.row == target.row:
        left, right = COLUMNS[source.column] + WIDE, COLUMNS[target.column] - 3
        y = ROWS[source.row] + HIGH / 2
        path = f"M{left:.0f} {y:.0f}H{right:.0f}"
    else:
        left, right = COLUMNS[source.column] + WIDE - 40, COLUMNS[target.column] + WIDE / 2
        foot, head = ROWS[source.row] + HIGH, ROWS[target.row] - 3
        y = (foot + head) / 2
        path = f"M{left:.0f} {foot:.0f}V{y - 10:.0f}q0 10 10 10H{right - 10:.0f}q10 0 10 10V{head:.0f}"
    # Text stays clear of the two corners.
    middle, room = (left + right) / 2, right - left - (0 if source.row == target.row else 24)
    above = [text(shorten(line, room + 8), middle, y - 8, "edge-name", "middle") for line in lines[:1]]
    below = [text(shorten(line, room + 8), middle, y + 18, "muted", "middle") for line in lines[1:2]]
    return element(
        "g",
        element("path", d=path, class_="arrow", marker_end="url(#arrow)"),
        *above,
        *below,
        class_=target.style.css,
    )
