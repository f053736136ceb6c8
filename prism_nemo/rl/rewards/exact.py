"""Is the answer the expected text?"""

from __future__ import annotations

import re
import unicodedata

from prism_nemo.rl.rewards.final_answer import statements
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import Verifier

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ('"', '"'), ("'", "'"), ("“", "”"), ("`", "`"))
_LONGEST = 4000
_EMPHASIS = re.compile(r"^(\*{1,3}|_{1,3})(.+)\1$", re.DOTALL)


def normalised(text: str) -> str:
    """A text without what does not change what it says.

    Unicode's compatibility forms, case, runs of spaces, emphasis, math delimiters and quotes around it, and a full stop
    after it. Words, their order and inner punctuation count.
    """
    text = unicodedata.normalize("NFKC", text)
    text = " ".join(_WRAPPED.sub(r"\1", text).split())
    before = None
    while text != before:
        before = text
        text = text.strip()
        text = text.rstrip(".,;! ") or text[:1]
        emphasis = _EMPHASIS.match(text)
        if emphasis:
            text = emphasis[2]
        for left, right in _DELIMITERS:
            inner = text[len(left) : len(text) - len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                if right not in inner:
                    text = inner
                break
    return text.casefold()


class ExactVerifier(Verifier):
    """1 if the answer is the expected text, but for spaces, case and markup; else 0.

    The answer is all that the response says after thinking, or what that says is the answer (see
    `final_answer.statements`).
    """

    name = "exact"
    isolated = False

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Verifier.verify`."""
        expected = normalised(problem.answer)
        if not expected:
            return 0.0
        # What is much longer is no answer and nothing else, and not worth being taken apart.
        if len(answer) <= max(_LONGEST, 2 * len(problem.answer)) and normalised(answer) == expected:
            return 1.0
        found = statements(answer)
        return float(bool(found) and all(expected in (normalised(s.text), normalised(s.line)) for s in found))
