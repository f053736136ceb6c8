"""Scoring of long-context answers: the share of the parts that were named, and nothing for naming everything."""

from __future__ import annotations

import re

from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import Verifier

_WORD = re.compile(r"[^\W_]+")
# 1,234,567 is the number 1234567.
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


class PartsVerifier(Verifier):
    """Recall of the gold parts, as whole words and in any order.

    An answer that names more different candidates than there are parts scores 0: RULER's own rule, which looks for the
    parts as substrings, gives full marks to a copy of the whole context.

    ``Problem.metadata``: ``parts`` (texts, each one word), and either ``candidates`` (words that could be meant) or
    ``pattern`` (a regular expression that every word of the kind matches as a whole).
    """

    name = "long_context_parts"
    isolated = False

    def verify(self, problem: Problem, answer: str) -> float:
        """The share of the parts in the answer, 0 to 1."""
        parts = set(problem.metadata["parts"])
        words = set(_WORD.findall(_THOUSANDS.sub("", answer)))
        if "candidates" in problem.metadata:
            named = words.intersection(problem.metadata["candidates"])
        else:
            named = {word for word in words if re.fullmatch(problem.metadata["pattern"], word)}
        return 0.0 if len(named) > len(parts) else len(named & parts) / len(parts)
