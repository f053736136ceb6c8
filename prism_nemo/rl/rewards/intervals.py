"""Intervals, their unions, and inequalities in one variable, which are intervals too."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import permutations

from prism_nemo.rl.rewards.brackets import closes_at_end, split

_MOST_PIECES = 6
_REALS = re.compile(r"^(?:\\mathbb\s*\{?R\}?|\\R|R|all real numbers|all reals|the real numbers)$", re.IGNORECASE)
_RELATION = re.compile(r"(\\leq|\\geq|<|>)(?![a-zA-Z])")

_Piece = tuple[str, str, str, str]  # left bracket, from, to, right bracket


def same_intervals(gold: str, given: str, same: Callable[[str, str], bool]) -> bool | None:
    """Compare intervals and inequalities; None unless one side can only be such.

    Args:
        gold: The expected answer, canonical.
        given: An answer, canonical.
        same: Compares ends.
    """
    first, second = _intervals(gold), _intervals(given)
    if first is None or second is None:
        return None
    if not (first[1] or second[1]):
        return None  # (1, 2) on both sides: a point is compared in the same way
    if first[2] and second[2] and first[2] != second[2]:
        return False  # in different variables
    if len(first[0]) != len(second[0]) or len(first[0]) > _MOST_PIECES:
        return False

    def equal(a: _Piece, b: _Piece) -> bool:
        return (a[0], a[3]) == (b[0], b[3]) and same(a[1], b[1]) and same(a[2], b[2])

    return any(all(map(equal, first[0], order)) for order in permutations(second[0]))


def _intervals(text: str) -> tuple[list[_Piece], bool, str] | None:
    """Pieces of a union, whether it can be nothing else than intervals, and the variable if one is named."""
    variable = ""
    if match := re.match(r"^([a-zA-Z])\s*\\in(?![a-z])\s*(.+)$", text):
        variable, text = match[1], match[2]
    if _REALS.match(text):
        return [("(", "-\\infty", "\\infty", ")")], True, variable
    pieces: list[_Piece] = []
    certain = False
    for part in split(text, r"\\cup(?![a-z])|\\text\s*\{\s*or\s*\}|\bor\b|\\lor(?![a-z])|\\vee(?![a-z])"):
        if part[:1] in "([" and part[-1:] in ")]" and part and closes_at_end(part):
            ends = split(part[1:-1], r",")
            if len(ends) != 2:
                return None
            certain |= part[0] == "[" or part[-1] == "]" or "\\infty" in part or "\\cup" in text or bool(variable)
            pieces.append((part[0], ends[0], ends[1], part[-1]))
            continue
        relation = _relation(part)
        if relation is None or (variable and relation[1] != variable):
            return None
        variable = relation[1]
        certain = True
        pieces.append(relation[0])
    return pieces, certain, variable


def _relation(text: str) -> tuple[_Piece, str] | None:
    """An inequality in one variable as an interval."""
    pieces = [piece.strip() for piece in _RELATION.split(text)]
    signs, terms = pieces[1::2], pieces[0::2]
    names = [i for i, term in enumerate(terms) if re.fullmatch(r"[a-zA-Z](?:_\{?\w+\}?)?", term)]
    if len(names) != 1 or len(terms) not in (2, 3) or "" in terms:
        return None
    i = names[0]
    if len(terms) == 3 and (i != 1 or (signs[0] in ("<", "\\leq")) != (signs[1] in ("<", "\\leq"))):
        return None
    low, high = ("(", "-\\infty"), (")", "\\infty")
    for sign, other, before in [(signs[k], terms[k + (k >= i)], k < i) for k in range(len(signs))]:
        closed = sign in ("\\leq", "\\geq")
        if (sign in ("<", "\\leq")) == before:
            low = ("[" if closed else "(", other)
        else:
            high = ("]" if closed else ")", other)
    return (low[0], low[1], high[1], high[0]), terms[i]
