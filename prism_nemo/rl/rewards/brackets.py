"""Where brackets in formulas open and close; each function reads a text once, whatever stands in it."""

from __future__ import annotations

import re


def split(text: str, separator: str) -> list[str]:
    """Pieces at the separators that stand in no bracket."""
    pattern = re.compile(separator, re.IGNORECASE)
    pieces, depth, start, i = [], 0, 0, 0
    while i < len(text):
        char = text[i]
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif depth <= 0 and (match := pattern.match(text, i)) and match.end() > i:
            pieces.append(text[start:i].strip())
            i = start = match.end()
            continue
        i += 1
    return [*pieces, text[start:].strip()]


def closes_at_end(text: str) -> bool:
    """Whether the bracket that a text begins with closes with its last character."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


def deepest(text: str) -> int:
    """How many brackets stand in each other."""
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def closings(text: str) -> dict[int, int]:
    """Where the braces of LaTeX close: places of ``{`` with those of their ``}``; none for one that stays open.

    A brace behind a backslash is a character like others.
    """
    found: dict[int, int] = {}
    opened: list[int] = []
    i = 0
    while i < len(text):
        char = text[i]
        if char == "{":
            opened.append(i)
        elif char == "}" and opened:
            found[opened.pop()] = i
        i += 2 if char == "\\" else 1
    return found
