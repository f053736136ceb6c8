"""One spelling for the many ways in which an answer can be typed: LaTeX, Unicode, Markdown, plain text."""

from __future__ import annotations

import re
import unicodedata

_UNICODE = {
    "−": "-",
    "–": "-",
    "‐": "-",
    "‑": "-",
    "×": "\\times ",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "÷": "/",
    "∕": "/",
    "π": "\\pi ",
    "∞": "\\infty ",
    "≤": "\\leq ",
    "⩽": "\\leq ",
    "≥": "\\geq ",
    "⩾": "\\geq ",
    "≠": "\\neq ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "±": "\\pm ",
    "∅": "\\emptyset ",
    "ℝ": "\\mathbb{R}",
    "≈": "\\approx ",
    "θ": "\\theta ",
    "α": "\\alpha ",
    "β": "\\beta ",
    "λ": "\\lambda ",
    "°": "^\\circ ",
    "’": "'",
}
_UNICODE |= {
    c: f" \\frac{{{a}}}{{{b}}}" for c, a, b in ("½12", "⅓13", "¼14", "⅔23", "¾34", "⅕15", "⅖25", "⅗35", "⅘45", "⅛18")
}
_UNICODE |= {c: f"^{{{i}}}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_TABLE = str.maketrans(_UNICODE)
_REPLACED = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"</?(?:answer|final_answer|final|solution|result|b|i|em|strong|p|br)\s*/?>", " "),
        (r"\\(?:displaystyle|textstyle|limits|left|right|bigl|bigr|big|Big|Bigl|Bigr)(?![a-zA-Z])", ""),
        (r"\\[,;:!>]|\\ |~|\\q?quad(?![a-zA-Z])|\\thinspace", " "),
        (r"\{,\}", ","),
        (r"(?<=\d),\s?\\!\s?(?=\d{3})", ","),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\sqrt\s+\{", r"\\sqrt{"),
        (r"√\s*\(([^()]*)\)|√\s*\{([^{}]*)\}|√\s*(\d+|[a-z])", r"\\sqrt{\1\2\3}"),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\\(?:mathrm|mathbf|textbf|textit|textrm|textnormal|mbox|operatorname|mathit|bf|rm)\s*(?=\{)", r"\\text"),
        (r"\\(?:le|leqslant)(?![a-zA-Z])|<=", r"\\leq "),
        (r"\\(?:ge|geqslant)(?![a-zA-Z])|>=", r"\\geq "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\ne(?![a-zA-Z])|!=", r"\\neq "),
        (r"\\(?:lbrace|rbrace)(?![a-zA-Z])", lambda m: "\\{" if "l" in m[0][1] else "\\}"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"(?<=[\w}])_\s*([a-zA-Z\d])", r"_{\1}"),
        (r"\{[bB]matrix\}|\{matrix\}|\{smallmatrix\}", "{pmatrix}"),
        (r"\*\*(?=\s*[\d({-])", "^"),
        (r"\^\s*(-?\d+|[a-zA-Z])", r"^{\1}"),
        (r"\^\s*\(\s*(-?\w+)\s*\)", r"^{\1}"),
        (r"(?<=[\w)}])\s*\*\s*(?=[\w({\\])", r" \\cdot "),
    )
]
_BARE_TEXT = re.compile(r"^\\text\s*\{([^{}]*)\}$")
_BOX = re.compile(r"^\\(?:boxed|fbox)\s*\{(.*)\}$", re.DOTALL)


def unwrapped(text: str) -> str:
    """A text without the delimiters, emphasis, quotes and full stop around it."""
    before = None
    while text != before:
        before = text
        text = text.strip().strip("`").strip()
        text = re.sub(r"^(\*{1,3}|_{2,3})(.+?)\1(?=[.!,]?$)", r"\2", text, flags=re.DOTALL)
        # After a delimiter an exclamation mark is none of mathematics.
        text = re.sub(r"(?<=[$*)\]])!$", "", text) if text[-2:] in ("$!", "*!") else text
        text = re.sub(r"(?<!\\)[.,;:]$", "", text)
        for left, right in (("\\(", "\\)"), ("\\[", "\\]"), ('"', '"'), ("“", "”")):
            if text.startswith(left) and text.endswith(right) and len(text) >= len(left + right):
                text = text[len(left) : -len(right)]
        if box := _BOX.match(text):
            text = box[1]
    return text


def canonical(text: str) -> str:
    """The same answer in one spelling; what it says is not changed.

    Dollar signs go, but for an escaped one or one before a number without a partner (currency).
    """
    text = unwrapped(text.translate(_TABLE))
    text = unicodedata.normalize("NFKC", text).translate(_TABLE)
    text = text.replace("\\$", "\0").replace("\\%", "%")
    if text.count("$") % 2 and re.match(r"^-?\$\d", text):
        text = text.replace("$", "\0", 1)
    text = text.replace("$", " ").replace("\\(", " ").replace("\\)", " ").replace("\\[", " ").replace("\\]", " ")
    text = text.replace("\0", "\\$")
    for pattern, to in _REPLACED:
        text = pattern.sub(to, text)
    text = unwrapped(" ".join(text.split()))
    if bare := _BARE_TEXT.match(text):
        text = bare[1].strip()
    return text
