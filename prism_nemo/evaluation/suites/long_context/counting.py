"""Aggregation: which words of a long list occur most often. There is nothing to find; all of it has to be read."""

from __future__ import annotations

import random

from prism_nemo.evaluation.suites.long_context.filler import Filler, made_up_words
from prism_nemo.evaluation.suites.long_context.kinds import Hidden, Kind

# Of RULER: ten words that occur 30 times each, among words that occur 3 times.
_COMMON, _OFTEN, _SELDOM = 10, 30, 3
# Of RULER: frequencies fall with the square of the rank, and the first three are asked for.
_FIRST, _ALPHA = 3, 2.0


class CommonWords(Kind):
    """Ten words that occur often, all others seldom."""

    name = "common_words"
    answer_tokens = 120

    def hide(self, rng: random.Random, depth: float, room: int) -> Hidden:
        """The words; `depth` means nothing here, as they are everywhere."""
        words = made_up_words(rng, _COMMON + 64 + room // (2 * _SELDOM))  # a word has two tokens or more
        return Hidden(
            statements=words,
            depths=[rng.random()],  # seed of the order
            lead="Below is a list of words. Some of them occur much more often than the others.",
            question=f"Question: What are the {_COMMON} most common words in the list above?\n"
            f"Answer: The {_COMMON} most common words are",
            parts=tuple(words[:_COMMON]),
            judging={"candidates": words},
        )

    def render(self, hidden: Hidden, filler: Filler, units: int, short: int) -> str:
        """The list with `units` seldom words (each three times), and `short` more words that occur once."""
        seldom = hidden.statements[_COMMON:]
        listed = [word for word in hidden.parts for _ in range(_OFTEN)]
        listed += [word for word in seldom[:units] for _ in range(_SELDOM)]
        listed += seldom[units : units + short]
        random.Random(hidden.depths[0]).shuffle(listed)
        return f"{hidden.lead}\n\n{' '.join(listed)}\n\n{hidden.question}"


class FrequentWords(Kind):
    """Words whose frequencies fall steeply; the three most frequent are asked for."""

    name = "frequent_words"
    answer_tokens = 50

    def hide(self, rng: random.Random, depth: float, room: int) -> Hidden:
        """The words in the order of their frequency; `depth` means nothing here."""
        words = made_up_words(rng, 64 + int((room / 2) ** (1 / _ALPHA)))
        return Hidden(
            statements=words,
            depths=[rng.random()],  # seed of the order
            lead="Below is a text in an unknown language.",
            question=f"Question: What are the {_FIRST} most frequent words in the text above?\n"
            f"Answer: The {_FIRST} most frequent words are",
            parts=tuple(words[:_FIRST]),
            judging={"candidates": words},
        )

    def render(self, hidden: Hidden, filler: Filler, units: int, short: int) -> str:
        """A text in which the word of rank r occurs 16 (units + 1) / r^2 times, and `short` more words once."""
        top = 16 * (units + 1)
        listed: list[str] = []
        for rank, word in enumerate(hidden.statements, 1):
            times = int(top / rank**_ALPHA)
            if times < 1:
                listed += hidden.statements[rank - 1 : rank - 1 + short]
                break
            listed += [word] * times
        random.Random(hidden.depths[0]).shuffle(listed)
        return f"{hidden.lead}\n\n{' '.join(listed)}\n\n{hidden.question}"
