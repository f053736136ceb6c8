"""Text of other people in Markdown: names of sources, tasks, models and licences are shown, never obeyed."""

from __future__ import annotations

import re
import unicodedata

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

LONGEST = 200
# Anywhere; at the start of a text, where they would begin a list; and what GitHub and the hub turn into links.
_SPECIAL = re.compile(r"([\\`*_\[\]#!|~$@]|^[+-]|:(?=//)|(?<=www)\.|^\d+(?=[.)]))", re.IGNORECASE)


def plain(text: object) -> str:
    """Text in one line, without control characters and marks that turn the direction of what follows.

    Args:
        text: Anything; what is longer than `LONGEST` characters is cut, and ends in three dots.
    """
    spaced = " ".join(str(text).split())
    kept = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
    return kept if len(kept) <= LONGEST else kept[: LONGEST - 3] + "..."


def escape(text: object) -> str:
    """Text that Markdown and HTML show as it is: no link, no tag, no table cell, no heading.

    Only characters that begin something are escaped, and letters, digits, spaces, dots and commas never.
    """
    shown = _SPECIAL.sub(lambda found: _escaped(found[0]), plain(text).replace("&", "&amp;"))
    return shown.replace("<", "&lt;").replace(">", "&gt;")


def _escaped(found: str) -> str:
    """A backslash before a sign; the first digit of a number, which takes none, as its character code."""
    return f"&#{ord(found[0])};{found[1:]}" if found[0].isdigit() else f"\\{found}"


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits."""
    return f"{value:,.0f}" if abs(value) >= 10**digits or value == int(value) else f"{value:.{digits}g}"


def environment() -> Environment:
    """A jinja environment in which every value is escaped unless it is marked as Markdown of our own (`Markup`)."""
    return Environment(
        loader=PackageLoader("prism_nemo.checkpoint.model_card", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else escape("" if value is None else value),
    )
