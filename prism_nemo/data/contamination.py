"""Finding evaluation text inside training text, by shared runs of words.

Words are compared in a normal form: compatibility characters unified, case folded, apostrophes gone, everything else
that is neither letter nor digit (punctuation, white space, line breaks, underscores) a border between words. So a
planted item is found however it was reformatted. A document that shares `ngram` consecutive words with an item is
contaminated.

An item of fewer words than `ngram` is looked for as a whole if it has at least `SHORTEST` words. Shorter ones ("yes",
"4") would match everywhere; they are counted, so that the report can say what was not looked for.

The method is that of GPT-3 (arXiv 2005.14165, appendix C), which uses 13-grams; the study gives no procedure.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from prism_nemo.data.documents import evaluation_records
from prism_nemo.data.mixture import Decontaminate

SHORTEST = 6
"""Words of the shortest item that is looked for."""

_WORDS = re.compile(r"[^\W_]+")
_APOSTROPHES = str.maketrans("", "", "'’ʼ`´＇")
# 16 million bits of one byte each: a first look that is wrong for few windows, so that few are compared word by word.
_TABLE_BITS = 24
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def normal_words(text: str) -> list[str]:
    """Returns the words of a text in their normal form."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORDS.findall(text.translate(_APOSTROPHES).casefold())


@dataclass(frozen=True)
class Overlap:
    """A piece of evaluation text in a document.

    Attributes:
        evaluation: `file:line` of the evaluation item.
        words: The shared words, in their normal form.
    """

    evaluation: str
    words: str


class Contamination:
    """The evaluation sets, ready to be looked for. Small enough to be sent to every process.

    Attributes:
        items: Texts that are looked for.
        too_short: Texts that are not, because they have fewer than `SHORTEST` words.
        fingerprint: Over everything that decides which documents are found.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], ngram: int) -> None:
        """Takes pairs of a place (`file:line`) and a text."""
        self.items = self.too_short = 0
        self._vocabulary: dict[str, int] = {}
        self._runs: dict[int, dict[tuple[int, ...], str]] = {}
        for where, text in texts:
            words = normal_words(text)
            if len(words) < min(SHORTEST, ngram):
                self.too_short += 1
                continue
            self.items += 1
            size = min(ngram, len(words))
            ids = [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words]
            runs = self._runs.setdefault(size, {})
            for at in range(len(ids) - size + 1):
                runs.setdefault(tuple(ids[at : at + size]), where)
        words_in_order = list(self._vocabulary)
        content = [
            ngram,
            sorted(" ".join(words_in_order[i] for i in run) for runs in self._runs.values() for run in runs),
        ]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._tables: dict[int, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The tables are large and quickly made again.
        return {**self.__dict__, "_tables": None}

    def find(self, text: str) -> Overlap | None:
        """Returns the first run of words that the text shares with an evaluation item, or None."""
        words = normal_words(text)
        get = self._vocabulary.get
        ids = np.fromiter(map(get, words, repeat(-1)), np.int64, len(words))
        best: tuple[int, int] | None = None
        for size, table in self._lookup().items():
            for at in _candidates(ids, size, table):
                # Compared word by word, so what is reported is always true.
                if tuple(ids[at : at + size].tolist()) in self._runs[size]:
                    if best is None or at < best[0]:
                        best = (int(at), size)
                    break
        if best is None:
            return None
        at, size = best
        return Overlap(self._runs[size][tuple(ids[at : at + size].tolist())], " ".join(words[at : at + size]))

    def _lookup(self) -> dict[int, np.ndarray]:
        if self._tables is None:
            self._tables = {}
            for size in sorted(self._runs):
                table = np.zeros(1 << _TABLE_BITS, bool)
                runs = np.array(list(self._runs[size]), np.int64)
                table[_hashes(runs)] = True
                self._tables[size] = table
        return self._tables


def evaluation_texts(wanted: Decontaminate) -> Iterator[tuple[str, str]]:
    """Yields every text of the evaluation sets with its place.

    Raises:
        InputError: A file cannot be read: an evaluation set that is half read protects nothing.
    """
    for where, record in evaluation_records(wanted.against):
        for text in _strings(record):
            yield where, text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _candidates(ids: np.ndarray, size: int, table: np.ndarray) -> np.ndarray:
    """Positions of windows of known words whose hash is in the table, in order."""
    if len(ids) < size:
        return np.zeros(0, np.int64)
    # Words that no evaluation set has break a window; starts are the windows without one.
    unknown = np.zeros(len(ids) + 1, np.int32)
    np.cumsum(ids < 0, out=unknown[1:])
    starts = np.flatnonzero(unknown[size:] == unknown[:-size])
    if not len(starts):
        return starts
    return starts[table[_hashes(np.lib.stride_tricks.sliding_window_view(ids, size)[starts])]]


def _hashes(windows: np.ndarray) -> np.ndarray:
    total = np.zeros(len(windows), np.uint64)
    for column in range(windows.shape[1]):
        total = (total + windows[:, column].astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
        total ^= total >> np.uint64(29)
    return total >> np.uint64(64 - _TABLE_BITS)
