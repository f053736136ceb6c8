"""What a response commits itself to: boxes, answer tags, "the answer is ...", or its last line.

A verifier compares this and never searches a response for the right answer: a number that is merely mentioned, a list
of guesses ("7 or 8") and a denial ("not 7") earn nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prism_nemo.rl.rewards.brackets import closings

# Answers come at the end; what is long is mostly repetition, and regular expressions should not see all of it.
_LOOKED_AT = 4000
# Boxes in boxes in tags; more of them are noise.
_MOST_NESTED = 4
_DENIAL = re.compile(r"\b(?:not|never|neither|nor|cannot|\w+n['’]t|doubt|wrong|incorrect|false)\b|≠|\\neq?\b", re.I)
_UNSURE = re.compile(
    r"\b(?:if|whether|unless|suppose|assum\w+|maybe|perhaps|possibly|might|could|guess|either)\b", re.IGNORECASE
)
# After an answer: "7. Or 8." takes it back.
_RETRACTION = re.compile(
    r"[\s$.,;:!)\]}*_`\\-]*(?:<[^>]*>\s*)*(?:or|alternatively|maybe|perhaps|possibly|wait|actually|but|no|unless|hmm|oops)\b",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"[\s$)*_\]\\]*(?:(?:is|was|would be)\s+(?:not|wrong|incorrect|false)\b|isn['’]t\b)", re.IGNORECASE
)
_TAGS = re.compile(
    r"<(answer|final_answer|final|solution|result)>(.*?)(?:</\1>|\Z)"
    r"|\[(answer)\](.*?)(?:\[/answer\]|\Z)"
    r"|<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_HASHES = re.compile(r"^####[ \t]*(\S.*)$")
_MARK = r"[*_`\"'#\s]*"
_MARKERS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\bfinal\s+(?:answer|result)\b{_MARK}(?:\(.{{0,40}}?\))?{_MARK}(?::|=|\bis\b|\bare\b)",
        rf"[\"']?\banswer[\"']?(?:\s+(?:to|for|of)\s+(?:the|this|your)\s+\w+)?(?:\s+here|\s+then)?{_MARK}"
        r"(?::|=|->|→|⇒|\b(?:is|are|equals|would\s+be|should\s+be|must\s+be|will\s+be|has\s+to\s+be|comes\s+to|"
        r"turns\s+out\s+to\s+be)\b)",
    )
]
# Weaker words, which count on the last line only: steps on the way have results and totals too.
_RESULT = re.compile(r"\b(?:solution|result|total|output)\b[*_]*(?::|\s+(?:is|are|equals)\b)", re.IGNORECASE)
_HEADING = re.compile(r"^[#*_\s]*(?:final\s+)?(?:answer|result|solution)[*_\s:]*$", re.IGNORECASE)
_AFTER_MARKER = re.compile(
    r"^(?:[\s:*_`\"'=]|\b(?:therefore|thus|equal\s+to|equals|simply|just|exactly|clearly)\b)*", re.I
)
_MATH_BLOCK = re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]|\$[^$\n]*\$|\\\(.*?\\\)", re.DOTALL)
# A full stop between digits is a decimal point; "e.g. St. Louis" is why a statement also keeps its whole line.
_SENTENCE_END = re.compile(r"[.?](?=[\s*_`\"')\]}]|$)|!(?=\s|$)|;(?=\s+[a-zA-Z]{3})")
_EXPLANATION = re.compile(r",?\s+(?:because|since|as|which|where|so|for)\b.*", re.DOTALL | re.IGNORECASE)
_REMARK = re.compile(r"^,\s+(?!.*\b(?:or|and|not|but|maybe)\b)[a-zA-Z ]+$")  # "$x = 7$, a prime"
_CONCLUSION = re.compile(
    r"^(?:so|therefore|thus|hence|altogether|in\s+total|in\s+all|in\s+conclusion|overall|finally|consequently|"
    r"as\s+a\s+result|this\s+(?:means|gives)|∴|\\therefore)\b[\s,:]*(?:that\b)?\s*(?:we\s+(?:have|get|find|obtain)\b)?",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.])[-−]?[$€£]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?\s*(?:\\?%)?(?![\w^])")


@dataclass(frozen=True)
class Statement:
    """One thing that a response says is the answer.

    Attributes:
        text: Up to the end of the sentence.
        line: Up to the end of the line; the same where the statement has an end of its own, as a box has.
        sentence: The sentence before `text`.
    """

    text: str
    line: str
    sentence: str = ""


def statements(answer: str, _depth: int = 0) -> list[Statement]:
    """What a response says is the answer, all of the strongest kind that it uses; none if it says nothing clearly.

    The kinds, the strongest first: answer tags, boxes, ``####`` on the last line, "the final answer is", "the answer
    is", and then the last line. An answer that is taken back or denied does not count. If there are
    several, they must all be right: two different boxes are a hedge.
    """
    text = answer[-_LOOKED_AT:].strip()
    if not text or _depth > _MOST_NESTED:
        return []
    for find in (_tagged, _boxed, _hashed):
        found = find(text, _depth)
        if found is not None:
            return found
    for marker in _MARKERS:
        found = _marked(text, marker)
        if found is not None:
            return found
    found = _marked(text.splitlines()[-1], _RESULT)
    return found if found is not None else _last_line(text)


def _tagged(text: str, depth: int) -> list[Statement] | None:
    matches = list(_TAGS.finditer(text))
    if not matches:
        return None
    found: list[Statement] = []
    for match in matches:
        content = next((g for g in (match[2], match[4], match[5]) if g is not None), "").strip()
        found += statements(content, depth + 1) or [Statement(content, content)]
    return [] if _RETRACTION.match(text, matches[-1].end()) else found


def _boxed(text: str, depth: int) -> list[Statement] | None:
    found, end, any_box, closes = [], 0, False, closings(text)
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue  # a box in a box
        any_box = True
        close = closes.get(match.end() - 1)
        if close is None:
            continue
        content, end = text[match.end() : close], close + 1
        before = text[max(0, match.start() - 30) : match.start()]
        sentence = re.split(r"[.\n;]\s", before)[-1]
        if _DENIAL.search(sentence) or _TAKEN_BACK.match(text, end):
            content = ""  # "not \boxed{7}" commits to something that is not an answer
        inner = _boxed(content, depth + 1) if depth < _MOST_NESTED else []
        found += inner if inner is not None else [Statement(content.strip(), content.strip(), sentence)]
    if not any_box:
        return None
    return [] if found and _RETRACTION.match(text, end) else found


def _hashed(text: str, depth: int) -> list[Statement] | None:
    match = _HASHES.match(text.splitlines()[-1].strip())
    if match is None or _HEADING.match(match[1]) or any(m.search(match[1]) for m in _MARKERS):
        return None
    return [Statement(match[1].strip(), match[1].strip())]


def _marked(text: str, marker: re.Pattern[str]) -> list[Statement] | None:
    found, void, end = [], False, 0
    text = re.sub(r"^[#*_ \t]*((?:final )?answer)[*_ \t]*\n", r"\1:\n", text, flags=re.IGNORECASE | re.MULTILINE)
    for match in marker.finditer(text):
        if match.start() < end:
            continue
        before = re.split(r"[.;!?]\s|\n", text[: match.start()])[-1]
        start = match.end() + _AFTER_MARKER.match(text[match.end() :]).end()  # type: ignore[union-attr]
        content, line, stop, asked = _content(text, start)
        if not content or any(other.search(content) for other in _MARKERS):
            continue  # "Final answer: the final answer is 12" says it once
        end = stop
        opening = content[:20]
        if asked or _DENIAL.search(before) or _UNSURE.search(before) or _DENIAL.match(opening):
            void = True
            continue
        found.append(Statement(content, line, before))
    if not found:
        return [] if void else None
    return [] if _RETRACTION.match(text, end) else found


def _content(text: str, start: int) -> tuple[str, str, int, bool]:
    """The sentence and the line that begin at `start`, where the sentence ends, and whether it is a question."""
    block = _MATH_BLOCK.match(text, start)
    after = block.end() if block else start
    newline = text.find("\n", after)
    line_end = len(text) if newline < 0 else newline
    stop = _SENTENCE_END.search(text, after, line_end)
    end = stop.start() if stop else line_end
    sentence = text[start:end].strip()
    if block and (not text[after:end].strip(" *_`.") or _REMARK.match(text[after:end])):
        sentence = block[0]
    sentence = _EXPLANATION.sub("", sentence).strip().rstrip("*_` ")
    while sentence.endswith(("}", '"', "'", ",")) and (
        sentence[-1] != "}" or sentence.count("{") < sentence.count("}")
    ):
        sentence = sentence[:-1].rstrip()  # of JSON around it
    return sentence, text[start:line_end].strip(), end, bool(stop and stop[0] == "?")


def _last_line(text: str) -> list[Statement]:
    """The last line: an answer and nothing else, or a conclusion with one number or formula in it."""
    blocks = list(_MATH_BLOCK.finditer(text))
    block = blocks[-1] if blocks else None
    if block is not None and block[0].startswith(("$$", "\\[")) and not text[block.end() :].strip(" .*_`\n"):
        return [Statement(block[0], block[0])]
    line = text.splitlines()[-1].strip().strip("*_` ").strip()
    if line.endswith("?") or _DENIAL.match(line):
        return []
    sentence = re.split(r"(?<=[.!?])\s+", line)[-1]
    conclusion = _CONCLUSION.match(sentence)
    if conclusion is None:
        return [Statement(line.rstrip("."), line)]
    if _DENIAL.search(sentence) or _UNSURE.search(sentence):
        return []
    rest = sentence[conclusion.end() :].strip().rstrip(".!").strip()
    formulas = [m[0] for m in _MATH_BLOCK.finditer(rest)]
    if len(formulas) == 1 and not _NUMBER.search(rest.replace(formulas[0], " ")):
        return [Statement(formulas[0], rest)]
    numbers = _NUMBER.findall(rest) if not formulas else []
    if len(numbers) == 1 and "=" not in rest and not _COMPARES.search(rest):
        return [Statement(numbers[0].strip(), rest)]
    return [Statement(rest, rest)]


_COMPARES = re.compile(
    r"\b(?:more|less|fewer|greater|smaller|larger|at\s+(?:least|most)|between|under|over|above|below|or|of\s+the)\b"
    r"|\b(?:million|billion|thousand|hundred|dozen|half|times|squared|cubed)\b|[<>≤≥±^*/+]|\\[a-zA-Z]",
    re.IGNORECASE,
)
