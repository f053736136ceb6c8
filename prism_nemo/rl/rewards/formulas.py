"""Whether two formulas are the same function or number, by math-verify, which compares with sympy.

It is given one formula on each side, and none over which sympy would compute for minutes or fill the memory.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from prism_nemo.rl.rewards.brackets import closings, deepest

# Characters of a formula, and of an answer unless the expected one is about as long.
LONGEST = 400
# Sizes above which sympy computes for minutes or fills the memory.
_MOST_POWER_DIGITS = 5000
_MOST_BRACKETS = 25
_LARGEST_FACTORIAL = 1000
# A command of LaTeX.
COMMAND = re.compile(r"\\[a-zA-Z]+")


@lru_cache(maxsize=4096)  # the responses to one prompt share their answers
def same_formula(gold: str, given: str) -> bool:
    """Ask math-verify about two single formulas."""
    if not (_harmless(gold) and _harmless(given)):
        return False
    left, right = _parsed(gold), _parsed(given)
    if left is None or right is None:
        return False
    from math_verify import verify

    return bool(verify([left], [right], timeout_seconds=None)) and not _far_apart(left, right)


@lru_cache(maxsize=4096)
def _parsed(formula: str) -> Any:
    """A formula for sympy, or None if math-verify cannot read it."""
    # It warns once that nothing limits its time; the worker's owner does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import LatexExtractionConfig, parse

    found = parse(f"${formula}$", [LatexExtractionConfig()], parsing_timeout=None)
    return None if not found or isinstance(found[0], str) else found[0]


def _harmless(formula: str) -> bool:
    """Whether sympy reads a formula as it is meant, and in a short time."""
    if len(formula) > LONGEST or deepest(formula) > _MOST_BRACKETS:
        return False
    if re.search(r"\d\s+\d|\d\s*\(\s*\d+\s*\)|\d_|\d\s*[eE]\s*[-+]?\d|[?|:]\s*\d", formula):
        return False
    if re.search(r"[!}]\s*!|\)\s*!", formula):
        return False
    if any(int(n) > _LARGEST_FACTORIAL for n in re.findall(r"(\d+)\s*!", formula)):
        return False
    if re.search(r"\\(?:sum|prod|int|lim|iint|oint)(?![a-z])", formula):
        return False  # an answer that still has to be worked out, perhaps over 10^9 terms
    if any(len(n) > 6 for pair in re.findall(r"\\d?binom\s*\{([^{}]*)\}\s*\{([^{}]*)\}", formula) for n in pair):
        return False
    closes = closings(formula)
    for match in re.finditer(r"\^\s*(?:\{|([^\s{]))", formula):
        exponent = match[1] or formula[match.end() : closes.get(match.end() - 1, len(formula))]
        if "^" in exponent and not re.search(r"[a-zA-Z]", COMMAND.sub("", exponent)):
            return False  # a tower
        numbers = [
            int(n) for n in re.findall(r"\d+", exponent if match[1] is None else _digits(formula, match.start(1)))
        ]
        base = re.search(r"(\d+)\s*\)*\}*\s*$", formula[: match.start()])
        size = len(base[1]) if base else 1
        if any(n * size > _MOST_POWER_DIGITS for n in numbers):
            return False
        product = 1
        for n in numbers:
            product *= max(n, 1)
        if len(numbers) > 1 and product * size > _MOST_POWER_DIGITS:
            return False
    return formula.count("^") < 25


def _digits(text: str, start: int) -> str:
    match = re.match(r"\d+", text[start:])
    return match[0] if match else ""


def _far_apart(left: Any, right: Any) -> bool:
    """Whether two numbers differ although they are close: math-verify compares differences, not ratios."""
    from sympy import Expr, Float, N

    if not (isinstance(left, Expr) and isinstance(right, Expr)) or left.free_symbols or right.free_symbols:
        return False
    try:
        a, b = N(left.doit(), 30), N(right.doit(), 30)
        relative = 5e-6 if left.has(Float) or right.has(Float) else 1e-12
        return bool(abs(a - b) > relative * max(abs(a), abs(b)))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return False  # no number: math-verify's word stands
