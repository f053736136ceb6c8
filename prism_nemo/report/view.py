"""What the parts of the page hand to the templates: figures with their tables, and nothing that is markup already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns; the first column names the row, the others are aligned as numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(frozen=True)
class Figure:
    """A chart with its title, an explanation of what to see in it, and its numbers.

    Attributes:
        title: Heading of the card.
        svg: The picture.
        caption: How to read it, in a sentence or two.
        table: The numbers; None where one table serves several figures.
        wide: Whether it takes the full width of the page.
    """

    title: str
    svg: Markup
    caption: str
    table: Table | None = None
    wide: bool = False


@dataclass(frozen=True)
class Headline:
    """One big number and the plain sentence that it stands for."""

    topic: str
    big: str
    sentence: str
    css: str


@dataclass(frozen=True)
class Verdict:
    """Something that was checked: `yes`, `no` or `unknown`, what it was, and the detail."""

    state: str
    label: str
    claim: str
    detail: str
