"""Text that says nothing to the question: what needles are hidden in, and made-up words that exist nowhere else."""

from __future__ import annotations

import random
import re
from pathlib import Path

from prism_nemo.errors import InputError

_WHO = (
    "The old ferryman",
    "A travelling tailor",
    "The youngest of the bakers",
    "Our neighbour's aunt",
    "The night guard",
    "A tired surveyor",
    "The choir leader",
    "One of the gardeners",
    "The clockmaker's wife",
    "A student of botany",
    "The harbour pilot",
    "Nobody but the miller",
    "The woman at the window",
    "A retired judge",
    "The beekeeper",
    "Everyone on the train",
    "The stonemason",
    "A painter from the coast",
    "The postmistress",
    "The boy with the kite",
)
_DID = (
    "carried",
    "painted",
    "forgot",
    "repaired",
    "looked for",
    "wrapped up",
    "sold",
    "borrowed",
    "described",
    "weighed",
    "returned",
    "hid",
    "cleaned",
    "inherited",
    "admired",
    "measured",
    "drew",
    "traded",
    "misplaced",
    "polished",
)
_WHAT = (
    "a copper kettle",
    "the green umbrella",
    "two sacks of flour",
    "an atlas without a cover",
    "the broken lantern",
    "a basket of pears",
    "some faded ribbons",
    "the heavy oak door",
    "a pair of wooden skates",
    "an unfinished letter",
    "the church bell's rope",
    "a jar of plum jam",
    "half of a chess set",
    "the blue bicycle",
    "a folded map",
    "three clay whistles",
    "the narrow boat",
    "an empty birdcage",
    "a bundle of reeds",
    "the second violin",
)
_WHERE = (
    "behind the mill",
    "on the way to the market",
    "near the frozen lake",
    "in the upper town",
    "under the railway bridge",
    "beside the herb garden",
    "at the edge of the orchard",
    "along the canal",
    "in the empty theatre",
    "by the western gate",
    "across the valley",
    "at the foot of the stairs",
    "outside the bakery",
    "in the schoolyard",
    "below the lighthouse",
    "between the vineyards",
)
_WHEN = (
    "before the rain began",
    "while the shops were still closed",
    "on the first day of spring",
    "although it was late",
    "without telling anyone",
    "after the festival",
    "because the wind had turned",
    "as if nothing had happened",
    "when the fog lifted",
    "long before sunrise",
    "during the long winter",
    "and nobody asked why",
    "just as the lamps were lit",
    "in spite of the warning",
    "for the sake of an old promise",
    "until the music stopped",
)
SHORT = ("It rained.", "Time passed.", "Snow fell.", "Dogs barked.", "Ships left.", "Bells rang.")

_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "h",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# What looks like a needle: a digit, or a word of capitals such as a variable's name.
_LIKE_A_NEEDLE = re.compile(r"\d|\b[A-Z]{4,}\b|magic|VAR ")


class Filler:
    """An endless row of sentences, the same for the same seed.

    Args:
        rng: Decides the sentences.
        sentences: To draw from; None for the built-in ones (some two million).
    """

    def __init__(self, rng: random.Random, sentences: tuple[str, ...] | None = None) -> None:
        self._rng, self._sentences = rng, sentences
        self._made: list[str] = []

    def first(self, count: int) -> list[str]:
        """The first `count` sentences."""
        while len(self._made) < count:
            self._made.append(self._draw())
        return self._made[:count]

    def _draw(self) -> str:
        pick = self._rng.choice
        if self._sentences is not None:
            return pick(self._sentences)
        return f"{pick(_WHO)} {pick(_DID)} {pick(_WHAT)} {pick(_WHERE)} {pick(_WHEN)}."


def read_sentences(path: Path) -> tuple[str, ...]:
    """Sentences of a text file, such as held-out text, without those that could be taken for a needle.

    Raises:
        InputError: The file cannot be read, or has fewer than 100 sentences that can be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from error
    found = dict.fromkeys(" ".join(sentence.split()) for sentence in _SENTENCE_END.split(text))
    kept = tuple(sentence for sentence in found if sentence and not _LIKE_A_NEEDLE.search(sentence))
    if len(kept) < 100:
        raise InputError(f"{path}: has {len(kept)} sentences without numbers and capitals; at least 100 are needed")
    return kept


def made_up_words(rng: random.Random, count: int, syllables: int = 3) -> list[str]:
    """Different words that no language has, such as ``braifoudi``.

    Args:
        rng: Decides the words.
        count: How many.
        syllables: Of each.
    """
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))] = None
    return list(words)
