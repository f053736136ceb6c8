"""Numbers as people read them. Every function takes None and answers "not measured"."""

from __future__ import annotations

import math
from collections.abc import Callable

NOT_MEASURED = "not measured"

Format = Callable[[float], str]


def _absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def percent(value: float | None, digits: int = 1) -> str:
    """Formats a share between 0 and 1: 0.4727 is `47.3%`."""
    return NOT_MEASURED if value is None or _absent(value) else f"{100 * value:.{digits}f}%"


def interval(low: float | None, high: float | None) -> str:
    """Formats an interval of shares: `41.2 to 53.4%`."""
    if low is None or high is None or _absent(low) or _absent(high):
        return NOT_MEASURED
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def decimal(value: float | None, digits: int = 3) -> str:
    """Formats with a fixed number of decimals."""
    return NOT_MEASURED if value is None or _absent(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Formats a difference with its sign; the minus is the typographic one."""
    return NOT_MEASURED if value is None or _absent(value) else f"{value:+.{digits}f}".replace("-", "−")


def significant(value: float | None) -> str:
    """Formats a number of any size with four significant digits: `0.0213`, `1.2e-06`, `20,000`."""
    if value is None or _absent(value):
        return NOT_MEASURED
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def whole(value: float | None) -> str:
    """Formats a count in full with thousands separators: `1,024,000`."""
    return NOT_MEASURED if value is None or _absent(value) else f"{value:,.0f}"


def compact(value: float | None) -> str:
    """Formats a count for a glance: `935k`, `1.02M`, `26.2B`."""
    if value is None or _absent(value):
        return NOT_MEASURED
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Formats seconds: `0.3 s`, `55.2 s`, `8 min 32 s`, `2 h 05 min`."""
    if seconds is None or _absent(seconds):
        return NOT_MEASURED
    # The rounded value decides the unit, or 59.96 would print as "60.0 s".
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def gigabytes(value: float | None) -> str:
    """Formats a memory size that is already in GB."""
    return NOT_MEASURED if value is None or _absent(value) else f"{value:.1f} GB"


def clean(text: str, limit: int | None = None) -> str:
    """Makes text from outside safe to show: no control characters, no lone surrogates, at most `limit` characters.

    Model output can hold anything. A NUL ends some parsers early, a lone surrogate cannot be encoded, and an override
    such as U+202E turns the text of the page around. Escaping of HTML is the template's work, not done here.

    Args:
        text: What the model or the data said.
        limit: Cut after this many characters and say so; None keeps everything.
    """
    # Most text is plain; this check of the whole is far cheaper than one per character.
    shown = (
        text
        if text.isprintable()
        else "".join(character if _printable(character) else "\N{REPLACEMENT CHARACTER}" for character in text)
    )
    if limit is not None and len(shown) > limit:
        return f"{shown[:limit]} […cut, {len(shown) - limit:,} more characters]"
    return shown


def _printable(character: str) -> bool:
    code = ord(character)
    control = (code < 32 and character not in "\n\t") or 127 <= code < 160
    surrogate = 0xD800 <= code <= 0xDFFF
    turns_text = code in (0x200E, 0x200F) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return not (control or surrogate or turns_text)
