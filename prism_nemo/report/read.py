"""Values of a JSON file that may hold anything, and what they are worth.

Nothing that reads a run trusts the shape of what it reads: a run that was killed leaves a half-written line, a stage
that did not run leaves nothing, and neither may cost the reader the rest of the page.
"""

from __future__ import annotations

import math
from typing import Any


def number(value: object) -> float | None:
    """Returns a finite number, or None for anything else (a bool or a text that looks like a number included)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def share(value: object) -> float | None:
    """Returns a number between 0 and 1, or None for anything else."""
    found = number(value)
    return found if found is not None and 0.0 <= found <= 1.0 else None


def mapping(value: object) -> dict[str, Any]:
    """Returns the object of a JSON file, or an empty one if something else stands there."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """Returns the list of a JSON file, or an empty one if something else stands there."""
    return value if isinstance(value, list) else []


def objects(value: object) -> list[dict[str, Any]]:
    """Returns those entries of a list that are objects."""
    return [entry for entry in sequence(value) if isinstance(entry, dict)]


def words(value: object) -> str:
    """Returns a value as text; empty for None."""
    return "" if value is None else str(value)
