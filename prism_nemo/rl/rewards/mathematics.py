"""Does an answer equal the expected one, as mathematics?

What people write most is decided here, exactly: numbers (`plain_number`), words, lists, tuples, intervals and
inequalities in one variable. Everything else is math-verify's (0.9.0), which compares with sympy; it is given one
formula on each side and never a text to search. Without that care it was seen to accept "7 8" for 15 (a mixed number),
"2(3)" for 5, ``12_5`` for 12, anagrams of words (products of letters) and 1e-9 for 2e-9.
"""

from __future__ import annotations

import re

from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.brackets import closes_at_end, split
from prism_nemo.rl.rewards.exact import normalised
from prism_nemo.rl.rewards.final_answer import statements
from prism_nemo.rl.rewards.formulas import COMMAND, LONGEST, same_formula
from prism_nemo.rl.rewards.intervals import same_intervals
from prism_nemo.rl.rewards.latex import canonical
from prism_nemo.rl.rewards.plain_number import read_number, same_number
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import Verifier

_MOST_PARTS = 60
_PERCENT_ASKED = re.compile(r"percent|per cent|%", re.IGNORECASE)
_FUNCTION = re.compile(r"(?:arc|a)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|lim|max|min|gcd|lcm|mod|det")
_TWO_WORDS = re.compile(r"\b([a-zA-Z]{2,})\s+[a-zA-Z]{2,}\b")
_NOTHING = re.compile(r"none|dne|undefined|no|yes|true|false|odd|even")
_ASSIGNED = re.compile(
    r"^([a-zA-Z](?:_\{?\w+\}?)?'?|\\[a-z]+|[a-zA-Z]\([a-z\d]\))\s*(?:=|\\in(?![a-z]))\s*(.+)$", re.DOTALL
)
_HEDGED = re.compile(
    r"\b(?:not|neither|nor|either|maybe|perhaps|possibly|might|between|unless|approximately\s+not)\b|\?|\\neq|\w+n't\b",
    re.I,
)
_COMPARED = re.compile(
    r"\b(?:at (?:least|most)|(?:more|less|fewer|greater) than|or (?:more|less|fewer)|under|over|above|below)\b",
    re.IGNORECASE,
)
_UNIT = re.compile(
    r"^(.*\S)\s*((?:(?:square|cubic)\s+)?(?:(?<=\s)[a-zA-Z]{2,}|\\text\s*\{[a-zA-Z ]+\})(?:\s*\^\s*\{?[23]\}?)?)$"
)
# "1 000 000" and "3.141 592 65": digits in threes, which is how spaces are put into one number.
_GROUPED = re.compile(
    r"(?<![\d.,])(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?! ?[\d.])"
    r"|(?<![\d.,])(?<!\d )(?:\d+|[1-9]\d{0,2}(?: \d{3})+)\.(?:\d{3} )*\d{1,3}(?! ?\d)"
)
_ABOUT = re.compile(
    r"^(?:(?:about|approximately|roughly|around|exactly|precisely|just|only|equal to)\s+|=\s*)+", re.IGNORECASE
)


class MathVerifier(Verifier):
    """1 if what the response says is the answer equals the expected one, else 0.

    `Problem.answer` is the expected answer in LaTeX or plain text. Must run where something else limits time and
    memory: there are expressions over which sympy never ends. Uses no signals.
    """

    name = "math"
    isolated = True

    def prepare(self) -> None:
        """Import and warm up sympy, so that the first verdict is as quick as the others."""
        same_formula("\\frac{x}{2}", "\\frac{x}{3}")

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier.verify`.

        Raises:
            InputError: If the problem has no answer.
        """
        if not canonical(problem.answer):
            raise InputError(f"the problem '{problem.question[:60]}' has no answer that could be compared")
        percent_asked = _PERCENT_ASKED.search(problem.question) is not None
        found = statements(answer)
        if not found:
            return 0.0
        if all(same_answer(problem.answer, s.text, percent_asked) for s in found):
            return 1.0
        if len(found) == 1:
            # A value after the sentence's verb: "the answer to both is $x = 7$, a prime".
            return float(same_answer(problem.answer, found[0].line, percent_asked))
        # Several boxes, one for each solution.
        distinct = list(dict.fromkeys(canonical(s.text) for s in found))
        gold_parts = _parts(canonical(problem.answer))
        if len(distinct) < 2 or len(gold_parts) != len(distinct):
            return 0.0
        return float(same_answer(problem.answer, ", ".join(distinct), percent_asked))


def same_answer(gold: str, given: str, percent_asked: bool = False) -> bool:
    """Whether two answers are the same mathematics (see the module's text).

    Args:
        gold: The expected answer.
        given: An answer and nothing else.
        percent_asked: Whether a bare number may be a percentage.
    """
    gold, given = canonical(gold), canonical(given)
    if not gold or not given or len(given) > max(LONGEST, 2 * len(gold)):
        return False
    return _same(gold, given, percent_asked, 0)


def _same(gold: str, given: str, percent_asked: bool, depth: int) -> bool:
    if _squeezed(gold) == _squeezed(given):
        return True
    if depth > 4:
        return False
    for words in (_HEDGED, _COMPARED):
        if words.search(given) and not words.search(gold):
            return False
    verdict = same_intervals(gold, given, lambda a, b: _same(a, b, percent_asked, depth + 1))
    if verdict is not None:
        return verdict
    gold, given = _without_name(gold, given)
    if given == "":
        return False
    given = _ABOUT.sub("", given)
    numbers = read_number(gold), read_number(given)
    if numbers[0] is not None and numbers[1] is not None:
        return same_number(numbers[0], numbers[1], percent_asked)
    verdict = _as_collection(gold, given, percent_asked, depth)
    if verdict is not None:
        return verdict
    (gold, gold_unit), (given, given_unit) = _formula_and_unit(gold), _formula_and_unit(given)
    if _is_text(gold) or _is_text(given):
        return gold_unit == given_unit and normalised(gold) == normalised(given)
    if gold_unit and given_unit and gold_unit != given_unit:
        return False
    return same_formula(gold, given)


def _squeezed(text: str) -> str:
    """A text without the spaces that say nothing; one between two digits does: "1 2" is not 12."""
    if _is_text(text):
        return normalised(text)
    text = _GROUPED.sub(lambda number: number[0].replace(" ", ""), text)
    return re.sub(r"(?<![\d.])\s+|\s+(?![\d.])", "", text)


def _is_text(text: str) -> bool:
    """Whether a text is words: sympy would take them for products of letters, and anagrams for equal."""
    text = re.sub(r"\\(?:begin|end)\s*\{[a-z]+\}", " ", text)
    plain = COMMAND.sub(" ", re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text))
    if any(not _FUNCTION.fullmatch(m[1]) for m in _TWO_WORDS.finditer(plain)):
        return True
    runs = [run.lower() for run in re.findall(r"[a-zA-Z]+", plain)]
    return (
        any((len(run) >= 4 or _NOTHING.fullmatch(run)) and not _FUNCTION.fullmatch(run) for run in runs)
        or "\\text" in text
    )


def _without_name(gold: str, given: str) -> tuple[str, str]:
    """Both without ``x =`` and without the steps of a chain ``3 + 4 = 7``; "" if they name different things."""
    if any("=" in part for text in (gold, given) for part in _parts(text)[1:]):
        return gold, given  # "x = 1 or x = 2": each member has its own
    gold_name, given_name = _ASSIGNED.match(gold), _ASSIGNED.match(given)
    if gold_name and given_name and gold_name[1] != given_name[1]:
        return gold, ""
    if given_name and re.search(rf"(?<![a-zA-Z\\]){re.escape(given_name[1])}\s*=", given_name[2]):
        return gold, ""  # "x = 8 x = 7"
    if gold_name and (given_name or "=" not in given):
        gold = gold_name[2]
    if given_name and (gold_name or "=" not in gold):
        given = given_name[2]
    if "=" not in gold and len(split(given, r"=")) > 1 and len(split(given, r",|\band\b|\bor\b|;")) == 1:
        # Each step is a claim; the last one is the answer, unless the chain contradicts itself: "71 = 72".
        steps = split(given, r"=")
        whole = {number.value for step in steps if (number := read_number(step)) and number.value.denominator == 1}
        if len(whole) > 1:
            return gold, ""
        given = steps[-1]
    if "\\approx" in given and "\\approx" not in gold:
        # The exact form before it, unless that is only a name.
        pieces = split(given, r"\\approx")
        given = pieces[0] if pieces[0] and not re.fullmatch(r"[a-zA-Z]|\\[a-z]+", pieces[0]) else pieces[-1]
    return gold, given.strip()


def _formula_and_unit(text: str) -> tuple[str, tuple[str, int] | None]:
    """A formula without the known unit behind it, and the unit: ``8\\pi \\text{ cm}^2``, ``8\\pi square units``."""
    match = _UNIT.match(text)
    number = read_number(f"1 {match[2]}") if match else None
    return (match[1].strip(), (number.unit, number.power)) if match and number and number.unit else (text, None)


def _parts(text: str) -> list[str]:
    """The members of a list in text: "1, 2 and 3"; one for anything else."""
    if read_number(text) is not None:
        return [text]
    text = re.sub(r"\\text\s*\{\s*,?\s*(and|or)\s*\}", r" \1 ", text)
    # "1,234" is one number, "1,2" two.
    parts = split(text, r",?\s*\b(?:and|or)\b\s*|;|,(?!\d{3}(?!\d))|(?<!\d),|,(?=\d{3},?\s)")
    return [p for p in parts if p]


def _as_collection(gold: str, given: str, percent_asked: bool, depth: int) -> bool | None:
    """Compare lists, sets and tuples; None if both are single things."""
    (gold_kind, golds), (given_kind, givens) = _collection(gold), _collection(given)
    if gold_kind == given_kind == "":
        return None
    if len(golds) != len(givens) or len(golds) > _MOST_PARTS:
        return False
    if "matrix" in gold + given:
        return None
    if gold_kind != given_kind and any(f"{text[0]}{text[-1]}" in ("[)", "(]") for text in (gold, given)):
        return False  # a half-open interval is no list
    # "x = 1, y = 2" is a pair, as far as the other side has no names.
    ordered = "tuple" in (gold_kind, given_kind) or _names(golds) != _names(givens)
    if ordered and "set" in (gold_kind, given_kind):
        return False
    if gold_kind == given_kind == "tuple" and (gold[0], gold[-1]) != (given[0], given[-1]):
        return False
    if len(golds) == 1 and gold_kind != given_kind and "tuple" in (gold_kind, given_kind):
        return _same(golds[0], givens[0], percent_asked, depth + 1)
    if ordered:
        return all(_same(a, b, percent_asked, depth + 1) for a, b in zip(golds, givens, strict=True))
    left = list(givens)
    for part in golds:
        match = next((other for other in left if _same(part, other, percent_asked, depth + 1)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _collection(text: str) -> tuple[str, list[str]]:
    """``set``, ``list`` or ``tuple`` with the members, or "" with the text itself."""
    if text.startswith("\\{") and text.endswith("\\}") and split(text[2:-2], r"\\\}") == [text[2:-2].strip()]:
        return "set", split(text[2:-2], r",(?!\d{3}(?!\d))|;|(?<!\d),|,\s")
    sign = re.split(r"\\pm(?![a-z])", text)
    if len(sign) == 2 and len(_parts(text)) == 1:
        return "list", [f"{sign[0]}+{sign[1]}".lstrip("+ "), f"{sign[0]}-{sign[1]}"]
    parts = _parts(text)
    if len(parts) > 1:
        return "list", parts
    if text[:1] in "([" and text[-1:] in ")]" and closes_at_end(text):
        inner = split(text[1:-1], r",")
        return ("tuple", inner) if len(inner) > 1 else ("", [text])
    return "", [text]


def _names(parts: list[str]) -> bool:
    """Whether the members are values of different variables."""
    names = [match[1] for match in map(_ASSIGNED.match, parts) if match]
    return len(set(names)) > 1
