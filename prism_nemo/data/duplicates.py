"""Repeated documents: the same text, or nearly the same by MinHash.

What is kept depends on the order of the documents alone: the first of several stays. Signatures are made where the text
is (`rensa`, in the worker); the decision is made in one place and in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from prism_nemo.data.contamination import normal_words
from prism_nemo.data.mixture import Deduplicate
from prism_nemo.errors import InputError

DIGEST_BYTES = 16
PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_SEED = 42


def digest(text: str | bytes) -> bytes:
    """Returns 16 bytes that stand for a text: at 10^10 documents two of them agree by chance once in 10^18."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def check_near() -> None:
    """Raises InputError where near-duplicates cannot be looked for."""
    try:
        import rensa  # noqa: F401
    except ImportError:
        raise InputError(
            "deduplicate.near: needs rensa; run `pip install 'prism-nemo[data]'`, or ask for exact duplicates only."
        ) from None


def signatures(texts: Sequence[str]) -> np.ndarray:
    """Returns MinHash signatures, (texts, PERMUTATIONS) uint32, over shingles of normalised words; 0 without a word."""
    from rensa import RMinHash

    rows = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for row, text in zip(rows, texts, strict=True):
        words = normal_words(text)
        if not words:
            row[:] = 0  # signs alone: all such texts would look alike
            continue
        last = max(1, len(words) - _SHINGLE_WORDS + 1)
        shingles = {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(last)}
        minhash = RMinHash(num_perm=PERMUTATIONS, seed=_SEED)
        minhash.update(sorted(shingles))
        row[:] = minhash.digest()
    return rows


class Seen:
    """The documents kept so far."""

    def __init__(self, rule: Deduplicate) -> None:
        self._rule = rule
        self._digests: dict[bytes, str] = {}
        self._bands: list[dict[bytes, list[int]]] = []
        self._rows: list[np.ndarray] = []
        self._sources: list[str] = []
        if rule.near is not None:
            # Candidates are compared row by row afterwards, so bands are cut finer than the threshold asks for: of r
            # rows each, similar pairs are missed with (1 - s^r)^(128/r), under 0.1 % at the threshold.
            missed = {rows: (1 - rule.near**rows) ** (PERMUTATIONS // rows) for rows in (1, 2, 4, 8, 16)}
            rows = max((rows for rows, share in missed.items() if share < 1e-3), default=1)
            self._bands = [{} for _ in range(PERMUTATIONS // rows)]

    def add(self, key: bytes, signature: np.ndarray | None, source: str) -> tuple[str, str] | None:
        """Returns how the document repeats an earlier one, (`exact` or `near`, that one's source), or keeps it.

        Args:
            key: From `digest`.
            signature: One row of `signatures`; None where only exact repeats count.
            source: The document's source.
        """
        if self._rule.exact and key in self._digests:
            return "exact", self._digests[key]
        near: str | None = None
        if self._rule.near is not None and signature is not None and signature.any():
            bands = [part.tobytes() for part in signature.reshape(len(self._bands), -1)]
            near = self._near(signature, bands)
            if near is None:
                number = len(self._rows)
                self._rows.append(signature)
                self._sources.append(source)
                for table, band in zip(self._bands, bands, strict=True):
                    table.setdefault(band, []).append(number)
        if near is not None:
            return "near", near
        if self._rule.exact:
            self._digests[key] = source
        return None

    def _near(self, signature: np.ndarray, bands: list[bytes]) -> str | None:
        assert self._rule.near is not None
        candidates = {i for table, band in zip(self._bands, bands, strict=True) for i in table.get(band, ())}
        for i in sorted(candidates):
            if np.count_nonzero(self._rows[i] == signature) >= self._rule.near * PERMUTATIONS:
                return self._sources[i]
        return None
