"""Numbers as people write them, read exactly: 1,234.5, 3/4, 2 1/2, 50%, 1.2e6, 18 dollars, 3 million, seventy-two.

Of words those are read that can mean one number only: cardinal numbers, "minus" and "negative" before a number, "half",
"a third" and "three quarters", "two and a half", "a dozen". Others are no numbers here: ordinals ("third"), "a few",
"a couple", and sums that can be read in two ways ("one hundred and three quarters").
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


def _words(text: str) -> list[str]:
    return text.split()


_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_ONES = {
    word: i
    for i, word in enumerate(
        _words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen"
        )
    )
}
_TENS = {w: 10 * i for i, w in enumerate(_words("twenty thirty forty fifty sixty seventy eighty ninety"), start=2)}
_PARTS = {word: i for i, word in enumerate(_words("half third fourth fifth sixth seventh eighth ninth tenth"), start=2)}
_PARTS["quarter"] = 4
# One name for each unit; two answers with different units differ.
_UNITS = {
    alias: unit
    for unit, aliases in {
        "dollar": "dollar dollars usd",
        "cent": "cent cents",
        "euro": "euro euros eur",
        "pound": "pound pounds lb lbs",
        "degree": "degree degrees deg",
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "inch": "inch inches",
        "foot": "foot feet ft",
        "yard": "yard yards yd",
        "mile": "mile miles",
        "mg": "mg milligram milligrams",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "ounce": "ounce ounces oz",
        "ton": "ton tons tonne tonnes",
        "ms": "ms millisecond milliseconds",
        "s": "s sec secs second seconds",
        "min": "min mins minute minutes",
        "h": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years",
        "ml": "ml milliliter milliliters millilitre millilitres",
        "l": "L l liter liters litre litres",
        "N": "N newton newtons",
        "J": "J joule joules",
        "W": "W watt watts",
        "V": "V volt volts",
        "A": "A ampere amperes",
        "K": "K kelvin",
        "Hz": "Hz hertz",
        "Pa": "Pa pascal pascals",
        "mph": "mph",
        "km/h": "km/h kmh kph",
        "m/s": "m/s",
        "unit": "unit units",
    }.items()
    for alias in aliases.split()
}
# Words after a number that change what it says, so they are no unit: "7 squared", "7 or more", "7 is wrong".
_NOT_UNITS = frozenset(
    _words(
        "a an and or but if not no nor than then is are was were be been isn wrong incorrect false more less "
        "fewer greater smaller larger least most over under plus minus times divided by squared cubed "
        "factorial mod modulo choose root roots power powers base pi to through thru between maybe perhaps "
        "possibly probably approximately half halves third thirds quarter quarters double twice of out in on "
        "off e i x y z n k t r from up down ago mistake guess maximum minimum tens tenth tenths hundredth "
        "hundredths thousandths pairs pair score gross percent point points inclusive exclusive repeating "
        "recurring short too many"
    )
).union(_SCALES, _ONES, _TENS, _PARTS, {f"{word}s" for word in _SCALES})
_HARMLESS_TAILS = re.compile(
    r"\s+(?:in total|in all|altogether|total|overall|left|each|per \w+|a (?:day|week|month|year))$"
)
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+|{_INTEGER}\.(?!\d))"
_FRACTION = re.compile(
    rf"^([-+]?)\s*(?:\\frac\s*\{{\s*([-+]?)({_DECIMAL})\s*\}}\s*\{{\s*([-+]?)({_DECIMAL})\s*\}}|({_DECIMAL})\s*/\s*({_DECIMAL}))"
)
_MIXED = re.compile(
    r"^([-+]?)\s*(\d+)(?:\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?:\s+and\s+|\s+)(\d+)\s*/\s*(\d+))"
)
_SCIENTIFIC = re.compile(
    rf"^([-+]?\s*{_DECIMAL})\s*(?:[eE]([-+]?\d{{1,4}})|(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{{\s*([-+]?\d{{1,4}})\s*\}}"
    r"|\(?([-+]?\d{1,4})\)?))"
)
_PLAIN = re.compile(rf"^([-+]?)\s*({_DECIMAL})")
# "minus 3" and "negative \\frac{1}{2}"; before words, `_from_words` reads it.
_MINUS = re.compile(r"^(?:minus|negative)\s+(?=[\d.$€£¥]|\\\$|\\frac)", re.IGNORECASE)
# A larger power of ten would fill the memory.
_LARGEST_EXPONENT = 1000
_LONGEST = 400
# Significant digits from which a decimal may stand for 1/3.
_ROUNDED_DIGITS = 6


@dataclass(frozen=True)
class Number:
    """A number as written.

    Attributes:
        value: Exactly what is written, without the percent sign.
        percent: Whether it had one.
        digits: Digits after the point of a decimal, else None: then it is exact.
        significant: Significant digits as written; 0 unless it is a decimal.
        unit: Canonical name of a known unit, else "".
        power: Power of the unit.
    """

    value: Fraction
    percent: bool = False
    digits: int | None = None
    significant: int = 0
    unit: str = ""
    power: int = 1


def read_number(text: str) -> Number | None:
    """The number that a text is, with a unit or without; None if the text is anything else.

    Args:
        text: Without math delimiters; LaTeX fractions and powers of ten are known.
    """
    text = text.strip()
    if not text or len(text) > _LONGEST:
        return None
    text = _MINUS.sub("-", text)
    currency = re.match(r"^([-+]?)\s*(?:\\\$|[$€£¥])\s*(?=[\d.])", text)
    unit = ""
    if currency:
        symbol = text[: currency.end()].strip()[-1]
        unit = {"$": "dollar", "€": "euro"}.get(symbol, "")
        text = currency[1] + text[currency.end() :]
    found = _leading(text)
    if found is None:
        return None
    value, digits, significant, end = found
    scale, percent, known = _tail(text[end:])
    if scale is None or (known and unit and known[0] != unit):
        return None
    name, power = known or (unit, 1)
    return Number(value * scale, percent, None if scale != 1 else digits, significant, name, power)


def _leading(text: str) -> tuple[Fraction, int | None, int, int] | None:
    """Value, decimals, significant digits and end of the number that a text begins with."""
    if match := _MIXED.match(text):
        over, under = match[3] or match[5], match[4] or match[6]
        if int(under) == 0 or int(over) >= int(under):
            return None
        value = int(match[2]) + Fraction(int(over), int(under))
        return -value if match[1] == "-" else value, None, 0, match.end()
    if match := _FRACTION.match(text):
        over, under = _fraction(match[3] or match[6]), _fraction(match[5] or match[7])
        if under == 0:
            return None
        sign = (-1) ** [match[1], match[2], match[4]].count("-")
        return sign * over / under, None, 0, match.end()
    if match := _SCIENTIFIC.match(text):
        exponent = int(match[2] or match[3] or match[4])
        if abs(exponent) > _LARGEST_EXPONENT:
            return None
        mantissa = match[1].replace(" ", "")
        return _fraction(mantissa) * Fraction(10) ** exponent, None, 0, match.end()
    if match := _PLAIN.match(text):
        written = match[2].rstrip(".").replace(",", "")
        whole, _, after = written.partition(".")
        value = _fraction(match[1] + written)
        significant = len((whole + after).lstrip("0")) if after else 0
        return value, len(after) if after else None, significant, match.end()
    words = re.match(r"^[a-zA-Z][a-zA-Z \-]*[a-zA-Z]", text)
    return _from_words(words[0]) if words else None


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip("."))


def _from_words(text: str) -> tuple[Fraction, int | None, int, int] | None:
    """The number words that a text begins with: "minus one hundred and five", "two thirds", "one and a half"."""
    pieces = [(m[0].lower(), m.end()) for m in re.finditer(r"[a-zA-Z]+", text)]
    sign, i = 1, 0
    if pieces[0][0] in ("minus", "negative"):
        sign, i = -1, 1
    words = [word for word, _ in pieces]
    value, after = _cardinal(words, i)
    part = _part(words, after, value)
    if after == i:
        if words[i : i + 1] != ["half"]:
            return None
        value, after = Fraction(1, 2), i + 1
    elif part:
        if after > i + 1 or words[i] in _TENS:
            return None  # "one hundred three quarters": 100 + 3/4, or 103/4; "twenty thirds": 20/3, or some of 23
        value, after = value / part, after + 1
    elif words[after : after + 1] == ["and"]:
        over, end = _cardinal(words, after + 1)
        under = _part(words, end, over)
        if under and over < under:
            if value % 100 == 0:
                return None
            value, after = value + over / under, end + 1
    # "Two dozen", "half million": one such word after one number word or a share, which `_tail` multiplies with.
    scales = [word for word in words[after : after + 2] if word in _SCALES]
    if len(scales) > 1 or (scales and after > i + 1 and value.denominator == 1):
        return None
    return sign * value, None, 0, pieces[after - 1][1]


def _part(words: list[str], i: int, over: Fraction) -> int | None:
    """What word `i` divides by: 3 for "thirds", and for "third" after a one; None if it does not.

    "Twenty-third" is an ordinal, and "two third" a slip.
    """
    word = words[i] if i < len(words) else ""
    if over <= 1:
        return _PARTS.get(word) if over == 1 else None
    return 2 if word == "halves" else _PARTS.get(word.removesuffix("s")) if word.endswith("s") else None


def _cardinal(words: list[str], i: int) -> tuple[Fraction, int]:
    """The cardinal number from word `i` on, and the word after it (`i` if there is none)."""
    if words[i : i + 1] in (["a"], ["an"]):
        following = words[i + 1] if i + 1 < len(words) else ""
        if following == "dozen" or _part(words, i + 1, Fraction(1)):
            return Fraction(1), i + 1
        if following not in _SCALES:
            return Fraction(0), i
        words = [*words[:i], "one", *words[i + 1 :]]
    # What was read last: 1 for below twenty, 10, 100, 1000 for "thousand" and more; and the last of these.
    total = group = last = 0
    begin, scale = i, 10**15
    while i < len(words):
        word = words[i]
        value = _SCALES.get(word, 0)
        if word in _ONES and (i == begin or (_ONES[word] and last in (10, 100, 1000))):
            if last == 10 and _ONES[word] > 9:
                break
            group, last = group + _ONES[word], 1
        elif word in _TENS and last in (0, 100, 1000):
            group, last = group + _TENS[word], 10
        elif word == "hundred" and last in (1, 10) and 0 < group < 100:
            group, last = group * 100, 100
        elif 1000 <= value < scale and group:
            total, group, last, scale = total + group * value, 0, 1000, value
        elif not (word == "and" and last >= 100 and i + 1 < len(words) and words[i + 1] in {*_ONES, *_TENS} - {"zero"}):
            break
        i += 1
    return Fraction(total + group), i


def _tail(text: str) -> tuple[int | None, bool, tuple[str, int] | None]:
    """What follows a number: a factor (None if it makes the number something else), percent, and (unit, power)."""
    tail = text.strip()
    scale, percent = 1, False
    word = re.match(r"^([a-zA-Z]+)\b", tail)
    while word and word[1].lower() in _SCALES:
        scale *= _SCALES[word[1].lower()]
        tail = tail[word.end() :].strip()
        word = re.match(r"^([a-zA-Z]+)\b", tail)
    if match := re.match(r"^(?:\\?%|percent\b|per cent\b)", tail):
        percent, tail = True, tail[match.end() :].strip()
    if not tail:
        return scale, percent, None
    if re.match(r"^\^\s*\{?\s*\\circ\s*\}?\s*[CF]?$|^°\s*[CF]?$|^\\circ$|^\\degree$", tail):
        return scale, percent, ("degree", 1)
    wrapped = re.match(r"^\\text\s*\{\s*(.*?)\s*\}\s*(?:\^\s*\{?\s*(\d)\s*\}?)?$", tail)
    spaced = text[:1].isspace() or wrapped is not None or scale != 1 or percent
    name, raised = (wrapped[1], wrapped[2]) if wrapped else (tail, None)
    name = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", name).strip().rstrip(".")
    if power := re.match(r"^(square|sq\.?|cubic|cu\.?)\s+(.*)$", name):
        raised, name = "2" if power[1].startswith("sq") else "3", power[2]
    elif power := re.match(r"^(.*?)\s*(?:\^\s*\{?\s*([23])\s*\}?|\b(squared|cubed))$", name):
        raised = power[2] or ("2" if power[3] == "squared" else "3")
        name = power[1]
        if name not in _UNITS:
            return None, percent, None
    unit = _UNITS.get(name) or _UNITS.get(name.lower() if len(name) > 2 else name)
    if unit:
        # "5m" may be a product; "5 m" and "5\text{m}" are lengths.
        return (scale, percent, (unit, int(raised or 1))) if spaced or len(name) > 1 else (None, percent, None)
    name = _HARMLESS_TAILS.sub("", f" {name}").strip()
    words = name.split()
    if raised or not spaced or len(words) > 3 or any(not re.fullmatch(r"[a-zA-Z][a-zA-Z'’-]+", w) for w in words):
        return None, percent, None
    if any(w in _NOT_UNITS for w in re.split(r"[\s\-]+", name.lower())):
        return None, percent, None
    return scale, percent, (_UNITS[words[-1]], 1) if words and words[-1] in _UNITS else None


def same_number(gold: Number, given: Number, percent_asked: bool = False) -> bool:
    """Whether two numbers are the same.

    Exactly, or a decimal of at least six significant digits that a number without a finite decimal form rounds to.
    ``50%`` is 1/2; it is 50 too
    if the gold answer is a percentage or the question asks for one (`percent_asked`). A unit may be left out, but not
    be another one.
    """
    if (
        gold.unit
        and given.unit
        and (gold.unit, gold.power) != (given.unit, given.power)
        and "unit"
        not in (
            gold.unit,
            given.unit,
        )
    ):
        return False
    if _close(gold.value, given.value, gold, given) and (
        gold.percent == given.percent or gold.percent or percent_asked
    ):
        return True
    if gold.percent == given.percent:
        return False
    hundredth = Fraction(1, 100)
    return _close(
        gold.value * hundredth if gold.percent else gold.value,
        given.value * hundredth if given.percent else given.value,
        _shifted(gold),
        _shifted(given),
    )


def _shifted(number: Number) -> Number:
    if not number.percent or number.digits is None:
        return number
    return Number(number.value / 100, True, number.digits + 2, number.significant)


def _close(a: Fraction, b: Fraction, first: Number, second: Number) -> bool:
    if a == b:
        return True
    # What a decimal can write exactly is not rounded: 10000.0 is not 10000.01.
    return any(
        decimal.digits is not None
        and decimal.significant >= _ROUNDED_DIGITS
        and _is_endless(exact)
        and 2 * abs(a - b) <= Fraction(1, 10**decimal.digits)
        for decimal, exact in ((first, b), (second, a))
    )


def _is_endless(value: Fraction) -> bool:
    """Whether a number has no finite decimal form."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest != 1
