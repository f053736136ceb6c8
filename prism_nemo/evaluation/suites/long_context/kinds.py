"""The kinds of tasks: what is hidden, among what, and what is asked.

After RULER (Hsieh et al. 2024, arXiv 2404.06654): needles with one key, several keys and several values; variable
tracking over several hops; the most common and the most frequent words; and questions about one of many documents.
Its tokens to generate are taken over, except that tracking may use 60 of them for its five names. Texts are our own.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prism_nemo.evaluation.suites.long_context.filler import SHORT, Filler, made_up_words

_NUMBER = r"[1-9][0-9]{6}"
_NAME = r"[A-Z]{5}"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Hidden:
    """What one question is about.

    Attributes:
        statements: Sentences to hide, in the order in which they have to appear.
        depths: Where, from 0 (beginning) to 1 (end), ascending.
        lead: Text before the context.
        question: Text after it; the answer goes on where it ends.
        parts: The right answer.
        judging: ``candidates`` or ``pattern`` of `PartsVerifier`.
    """

    statements: Sequence[str]
    depths: Sequence[float]
    lead: str
    question: str
    parts: tuple[str, ...]
    judging: dict[str, Any]


class Kind(ABC):
    """A kind of task.

    Attributes:
        name: Of the task, before its length.
        answer_tokens: Longest answer.
    """

    name: str
    answer_tokens: int

    @abstractmethod
    def hide(self, rng: random.Random, depth: float, room: int) -> Hidden:
        """One question.

        Args:
            rng: Decides everything but the depth.
            depth: Of what is asked for, 0 to 1.
            room: Tokens of the prompt to be.
        """

    def render(self, hidden: Hidden, filler: Filler, units: int, short: int) -> str:
        """The prompt with `units` sentences of filler, and `short` short ones at the end of the context."""
        sentences = filler.first(units)
        pieces: list[str] = []
        done = 0
        for statement, depth in zip(hidden.statements, hidden.depths, strict=True):
            place = round(depth * units)
            pieces += [*sentences[done:place], statement]
            done = place
        pieces += [*sentences[done:], *(SHORT[i % len(SHORT)] for i in range(short))]
        return f"{hidden.lead}\n\n{' '.join(pieces)}\n\n{hidden.question}"


class Needle(Kind):
    """Numbers that belong to made-up keys.

    Args:
        name: Of the task.
        values: Numbers of the key that is asked for.
        others: Further keys with one number each, which are not asked for.
    """

    answer_tokens = 128

    def __init__(self, name: str, values: int = 1, others: int = 0) -> None:
        self.name = name
        self.values, self.others = values, others

    def hide(self, rng: random.Random, depth: float, room: int) -> Hidden:
        """The first number is hidden at `depth`, the rest anywhere."""
        key, *others = made_up_words(rng, 1 + self.others)
        numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), self.values + self.others)]
        placed = [(depth, key, numbers[0])]
        placed += [(rng.random(), key, number) for number in numbers[1 : self.values]]
        placed += [(rng.random(), other, n) for other, n in zip(others, numbers[self.values :], strict=True)]
        placed.sort()
        one = self.values == 1
        number = "number" if one else "numbers"
        return Hidden(
            statements=[f"A special magic number for {key} is {number}." for _, key, number in placed],
            depths=[place for place, _, _ in placed],
            lead=f"Some special magic {'number is' if one else 'numbers are'} hidden in the following text. Remember "
            f"{'it' if one else 'them'}; you will be asked afterwards.",
            question=f"Question: What {'is the' if one else f'are all {self.values}'} special magic {number} for {key} "
            f"in the text above?\nAnswer: The special magic {number} for {key} {'is' if one else 'are'}",
            parts=tuple(numbers[: self.values]),
            judging={"pattern": _NUMBER},
        )


class Hops(Kind):
    """Variables that get their value from one another, in chains; one chain is asked for.

    Args:
        hops: Steps from the first variable of a chain to its last.
        others: Further chains.
    """

    name = "hops"
    answer_tokens = 60

    def __init__(self, hops: int = 4, others: int = 1) -> None:
        self.hops, self.others = hops, others

    def hide(self, rng: random.Random, depth: float, room: int) -> Hidden:
        """The chain that is asked for begins at `depth` in the first half of the text, so that it has room to go on."""
        length = self.hops + 1
        names: dict[str, None] = {}
        while len(names) < length * (1 + self.others):
            names["".join(rng.choices(_LETTERS, k=5))] = None
        chains = [list(names)[i : i + length] for i in range(0, len(names), length)]
        values = [str(value) for value in rng.sample(range(10_000, 100_000), len(chains))]
        placed: list[tuple[float, int, str]] = []
        for number, (chain, value) in enumerate(zip(chains, values, strict=True)):
            first = depth / 2 if number == 0 else rng.random() / 2
            places = [first, *sorted(first + (1 - first) * rng.random() for _ in chain[1:])]
            sources = [value, *(f"VAR {name}" for name in chain[:-1])]
            placed += [
                (place, step, f"VAR {name} = {source}.")
                for step, (place, name, source) in enumerate(zip(places, chain, sources, strict=True))
            ]
        placed.sort()
        return Hidden(
            statements=[text for _, _, text in placed],
            depths=[place for place, _, _ in placed],
            lead="Follow the assignments of variables that are hidden in the following text.",
            question=f"Question: Which {length} variables have the value {values[0]} in the text above, directly or by "
            f"way of others?\nAnswer: The {length} variables with the value {values[0]} are",
            parts=tuple(chains[0]),
            judging={"pattern": _NAME},
        )


class Facts(Kind):
    """Questions about one of many short documents, each of a person, a trade and a town."""

    name = "facts"
    answer_tokens = 32

    def hide(self, rng: random.Random, depth: float, room: int) -> Hidden:
        """The document that holds the answer lies at `depth` among nine others."""
        count = 10
        people = [word.capitalize() for word in made_up_words(rng, count)]
        towns = [word.capitalize() for word in made_up_words(rng, 2 * count, syllables=4)]
        trades = rng.sample(_TRADES, count)
        depths = [depth, *(rng.random() for _ in range(count - 1))]
        order = sorted(range(count), key=lambda i: depths[i])
        return Hidden(
            statements=[
                f"{people[i]} was born in {towns[count + i]}, learned the trade of a {trades[i]} and now lives in "
                f"{towns[i]}."
                for i in order
            ],
            depths=[depths[i] for i in order],
            lead="Read the following text; you will be asked about one of the people in it.",
            question=f"Question: In which town does the {trades[0]} of the text above live now?\n"
            f"Answer: The {trades[0]} now lives in",
            parts=(towns[0],),
            judging={"candidates": towns},
        )


_TRADES = (
    "cooper",
    "glazier",
    "saddler",
    "chandler",
    "weaver",
    "printer",
    "tanner",
    "locksmith",
    "bookbinder",
    "potter",
    "furrier",
    "engraver",
    "thatcher",
    "falconer",
    "dyer",
)
