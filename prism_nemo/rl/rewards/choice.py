"""Multiple choice: the order in which options are shown, and which of them a response chose."""

from __future__ import annotations

import random
import re

from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.exact import normalised
from prism_nemo.rl.rewards.final_answer import Statement, statements
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import Verifier

LETTERS = "ABCDEFGHIJ"
_L = f"[{LETTERS}]"
_WORD = r"(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:option|choice|answer|letter)(?:\s+(?:is|choice))?"
# A letter that is all of the statement, or that something sets apart from a sentence: the article "A" is neither.
_WHOLE = re.compile(rf"^(?:{_WORD}\s*:?\s*)?[(\[]?\s*({_L}|[a-j])\s*[)\]]?\s*[.:]?$", re.IGNORECASE)
_SET_APART = re.compile(
    rf"^(?:{_WORD}\s*:?\s*)?(?:[(\[]\s*({_L}|[a-j])\s*[)\]]|({_L}|[a-j])\s*(?:[).:]|[-–—]{{1,2}}\s))\s*(.*)$", re.DOTALL
)
_NAMED = re.compile(rf"^(?:option|choice)\s+[(\[]?({_L})[)\]]?(?:\s+(.*))?$", re.IGNORECASE | re.DOTALL)
_LETTER_AND_TEXT = re.compile(
    rf"^(?i:{_WORD}\s*:?\s*)?(?:({_L})|[(\[]\s*({_L})\s*[)\]])(?:\s*,\s*|\s+)(.+)$", re.DOTALL
)
_IT_IS = re.compile(rf"^(?i:it\s+is|it['’]s|this\s+is|that\s+is)\s+[(\[]?\s*({_L})\s*[)\]]?\s*[.:]?$")
_TWO_LETTERS = re.compile(
    rf"\b(?:or|and|nor|not)\s+(?:option\s+|choice\s+)?[(\[]?{_L}(?![\w'’])|\b{_L}[)\]]?\s*[,/&]\s*[(\[]?{_L}\b"
)
_NEXT_LETTER = re.compile(rf"^\s*[(\[]?(?:{_L}|[a-j])[)\].:]")
_OTHER_LETTER = re.compile(
    rf"^\W*?(?:\b(?:or|and|nor|not)\b|[,/&])\s*(?:option\s+|choice\s+)?[(\[]?({_L})(?![\w'’])", re.IGNORECASE
)
_SAID = [
    re.compile(pattern)
    for pattern in (
        rf"(?i:\b(?:option|choice|answer)\b)\s+\**[(\[]?({_L})[)\]]?\**\s+(?i:is\s+(?:the\s+)?(?:correct|right|best|true))\b",
        rf"(?<![\w'’])\**[(\[]?({_L})[)\]]?\**\s+(?i:is\s+(?:the\s+)?(?:correct|right|best)\b)",
        rf"(?i:\b(?:choose|chose|pick|select|go\s+with|going\s+with|option\s+is|choice\s+is|letter\s+is|choice(?=:)))\s*:?\s+"
        rf"(?i:option\s+|choice\s+|answer\s+)?\**[(\[]?({_L})[)\]]?\**(?=\s*(?:[.,;:!)]|$))",
    )
]
_DENIED = re.compile(r"\b(?:not|never|cannot|\w+n['’]t|neither|nor|wrong|if|whether|why)\b", re.IGNORECASE)


def shuffled_options(question: str, options: list[str], right: int, seed: int) -> tuple[list[str], str]:
    """Options in the order in which they are shown, and the letter of the right one.

    The order depends on the seed and the question's text only, so it is the same in every run, and the right letter
    tells nothing: data sets were seen to have the same one for every question.

    Raises:
        InputError: If there are fewer than two options or more than there are letters, or `right` is none of them.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(f"'options': {len(options)} of them; there must be 2 to {len(LETTERS)}")
    if not 0 <= right < len(options):
        raise InputError(f"'answer': {right} is none of the {len(options)} options, which count from 0")
    order = list(range(len(options)))
    random.Random(f"{seed}/{question}").shuffle(order)
    return [options[i] for i in order], LETTERS[order.index(right)]


class ChoiceVerifier(Verifier):
    """1 if the response chose the right letter, or the right option's text, and no other; else 0.

    `Problem.answer` is the right letter, ``metadata["options"]`` the options' texts in the order shown.
    """

    name = "choice"
    isolated = False

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier.verify`.

        Raises:
            InputError: If the problem has no options, or its answer is not the letter of one.
        """
        options = problem.metadata.get("options")
        what = f"the problem '{problem.question[:60]}'"
        if not isinstance(options, list | tuple) or not 2 <= len(options) <= len(LETTERS):
            raise InputError(f"{what} needs 'options' in its metadata: 2 to {len(LETTERS)} texts")
        if problem.answer not in LETTERS[: len(options)] or len(problem.answer) != 1:
            raise InputError(
                f"{what}: the answer '{problem.answer}' is not the letter of one of {len(options)} options"
            )
        return float(chosen(answer, [str(option) for option in options]) == problem.answer)


def chosen(answer: str, options: list[str]) -> str | None:
    """The letter that a response chose; None if it chose none, or more than one.

    Args:
        answer: The response's text.
        options: Texts in the order shown.
    """
    found = statements(answer)
    letters = [_read(statement, options) for statement in found]
    if found and None not in letters:
        return letters[0] if len(set(letters)) == 1 else None
    if re.search(r"\\boxed|<answer>|####", answer[-4000:]):
        return None  # what it committed to is no choice
    said: set[str | None] = set()
    for line in answer[-4000:].splitlines():
        for sentence in re.split(r"(?<=[.!?])\s+", line):
            if _DENIED.search(sentence) or sentence.rstrip().endswith("?"):
                continue
            for match in (match for pattern in _SAID for match in pattern.finditer(sentence)):
                hedged = _TWO_LETTERS.search(sentence) or _OTHER_LETTER.match(sentence[match.end() :])
                said.add(None if hedged else match[1].upper())
    letter = said.pop() if len(said) == 1 else None
    return letter if letter is not None and letter in LETTERS[: len(options)] else None


def _read(statement: Statement, options: list[str]) -> str | None:
    """The option that one statement names."""
    for text in dict.fromkeys((statement.text, statement.line)):
        letter = _letter(_plain(text), options)
        if letter is not None:
            return letter
    return None


def _plain(text: str) -> str:
    """Without what is around letters in Markdown and LaTeX."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mathit|boxed|fbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[()\[\]]|\$|\*\*|__|`|</?\w+>", "", text)
    return text.strip().strip("*_\"' ").strip()


def _letter(text: str, options: list[str]) -> str | None:
    known = LETTERS[: len(options)]
    by_text = _by_text(text, options)
    if by_text is not None and (len(text) > 1 or text.upper() not in known):
        return by_text
    if match := _WHOLE.match(text) or _IT_IS.match(text):
        return match[1].upper() if match[1].upper() in known else None
    if match := _SET_APART.match(text):
        letter, rest = (match[1] or match[2]).upper(), match[3]
    elif match := _NAMED.match(text):
        letter, rest = match[1].upper(), match[2] or ""
    elif match := _LETTER_AND_TEXT.match(text):
        # "C Paris" and "C, Paris" are choices; "A dog" is one only if that is what option A says, and "C, D" is none.
        letter, rest = match[1] or match[2], match[3]
        second = _WHOLE.match(rest)
        if second and second[1].upper() != letter and second[1].upper() in known:
            return None
        return letter if _by_text(rest, options) == letter else None
    else:
        return None
    if letter not in known or _OTHER_LETTER.match(rest) or _NEXT_LETTER.match(rest):
        return None
    if re.match(r"^(?:is\s+)?(?:not|wrong|incorrect|false|or)\b", rest, re.IGNORECASE):
        return None
    other = _by_text(rest, options)
    return letter if other in (None, letter) else None


def _by_text(text: str, options: list[str]) -> str | None:
    """The letter of the one option that has this text."""
    wanted = normalised(text)
    same = [LETTERS[i] for i, option in enumerate(options) if normalised(option) == wanted]
    return same[0] if len(same) == 1 and wanted else None
