"""Cutting the documents of a source into rows of fixed length, for one epoch.

Two ways. `best_fit` cuts only documents that are longer than a row and fits the pieces together like parcels, so that a
row holds whole documents and a little padding (best-fit decreasing; Ding et al. 2024, arXiv 2404.10830, showed that
the truncations it avoids cost ability). `concatenate` lays the shuffled documents end to end and cuts at every row.

Either way every token is in exactly one row of the epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

PACKINGS = ("best_fit", "concatenate")

PIECE = np.dtype([("offset", np.int64), ("length", np.int32), ("goes_on", np.int32)])
"""A stretch of one document: its first token's place in the `.bin`, its tokens, and whether the document goes on."""

_STRETCH = 1 << 20  # documents looked at together, so that memory does not grow with their number


class Rows(NamedTuple):
    """The rows of an epoch.

    Attributes:
        first: Number of the first piece of each row and, last, the number of pieces, (rows + 1,) int64.
        pieces: Of type `PIECE`, row after row.
    """

    first: np.ndarray
    pieces: np.ndarray


class Placement(NamedTuple):
    """One step of `best_fit_plan`: pieces of one length for neighbouring rows.

    Attributes:
        length: Of the pieces.
        pieces: How many.
        first_row: Where they begin.
        each: Pieces per row; the last row may get fewer.
    """

    length: int
    pieces: int
    first_row: int
    each: int


def pack(packing: str, lengths: np.ndarray, seq_length: int, rng: np.random.RandomState) -> Rows:
    """Returns the rows of one epoch.

    Args:
        packing: One of `PACKINGS`.
        lengths: Tokens per document in the order of the `.bin`, (documents,), all positive.
        seq_length: Tokens per row.
        rng: Where the order comes from.
    """
    return (best_fit if packing == "best_fit" else concatenate)(lengths, seq_length, rng)


def count_rows(packing: str, lengths: np.ndarray, seq_length: int) -> int:
    """Returns how many rows an epoch has, which does not depend on the order, without packing anything."""
    if packing == "concatenate":
        return -(-int(lengths.sum(dtype=np.int64)) // seq_length)
    whole, histogram = 0, np.zeros(seq_length + 1, np.int64)
    for at in range(0, len(lengths), _STRETCH):
        full, rest = np.divmod(lengths[at : at + _STRETCH], seq_length)
        whole += int(full.sum(dtype=np.int64))
        histogram += np.bincount(rest, minlength=seq_length + 1)
    histogram[0] = 0  # documents of whole rows leave no rest
    return whole + best_fit_plan(histogram, seq_length)[0]


def concatenate(lengths: np.ndarray, seq_length: int, rng: np.random.RandomState) -> Rows:
    """Shuffled documents end to end, cut at every row; the last row of the epoch is padded."""
    order = rng.permutation(len(lengths))
    ends = np.cumsum(lengths[order], dtype=np.int64)
    total = int(ends[-1])
    rows = -(-total // seq_length)
    stops = np.sort(np.concatenate([ends, np.arange(1, rows) * seq_length]), kind="stable")
    stops = stops[np.diff(stops, prepend=0) > 0]  # a document may end where a row does
    starts = np.concatenate([[0], stops[:-1]])
    document = np.searchsorted(ends, starts, side="right")
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    pieces = np.empty(len(starts), PIECE)
    pieces["offset"] = begins[order[document]] + starts - (ends[document] - lengths[order[document]])
    pieces["length"] = stops - starts
    pieces["goes_on"] = stops < ends[document]
    first = np.searchsorted(starts, np.arange(rows + 1) * seq_length)
    return Rows(first.astype(np.int64), pieces)


def best_fit(lengths: np.ndarray, seq_length: int, rng: np.random.RandomState) -> Rows:
    """Whole documents fitted together; only those longer than a row are cut, into full rows and a rest."""
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    full, rest = np.divmod(lengths, seq_length)
    whole = int(full.sum(dtype=np.int64))
    left = np.flatnonzero(rest)
    pieces = np.empty(whole + len(left), PIECE)
    row = np.empty(len(pieces), np.int64)

    of = np.repeat(np.arange(len(lengths)), full)
    nth = np.arange(whole) - np.repeat(np.cumsum(full) - full, full)
    pieces["offset"][:whole] = begins[of] + nth * seq_length
    pieces["length"][:whole] = seq_length
    pieces["goes_on"][:whole] = (nth + 1) * seq_length < lengths[of]
    row[:whole] = np.arange(whole)

    # Which of the equally long documents meet is left to chance, so that epochs differ.
    shuffled = left[rng.permutation(len(left))]
    shuffled = shuffled[np.argsort(-rest[shuffled], kind="stable")]
    pieces["offset"][whole:] = begins[shuffled] + full[shuffled] * seq_length
    pieces["length"][whole:] = rest[shuffled]
    pieces["goes_on"][whole:] = 0
    fitted, plan = best_fit_plan(np.bincount(rest[left], minlength=seq_length + 1), seq_length)
    at = whole
    for step in plan:
        row[at : at + step.pieces] = whole + step.first_row + np.arange(step.pieces) // step.each
        at += step.pieces

    # Rows in random order, and the pieces within a row too.
    rows = whole + fitted
    row = rng.permutation(rows)[row]
    mixed = rng.permutation(len(pieces))
    order = mixed[np.argsort(row[mixed], kind="stable")]
    first = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=rows), out=first[1:])
    return Rows(first, pieces[order])


def best_fit_plan(histogram: np.ndarray, seq_length: int) -> tuple[int, list[Placement]]:
    """Best-fit decreasing over a histogram: pieces of one length are placed together.

    The longest piece goes first, each into the fullest row that still has room. Rows that stand alike are kept as
    ranges, so the work grows with the number of different lengths, not with the number of documents.

    Args:
        histogram: How many pieces of each length there are, (seq_length + 1,); there is none of length 0.
        seq_length: Tokens per row.

    Returns:
        The number of rows, and what goes where, by decreasing length.
    """
    free: dict[int, list[tuple[int, int]]] = {}  # room left -> ranges of rows that have it
    rooms: list[int] = []  # the keys of `free`, in order
    rows = 0
    plan: list[Placement] = []

    def put(room: int, begin: int, end: int) -> None:
        if room and begin < end:
            if room not in free:
                free[room] = []
                insort(rooms, room)
            free[room].append((begin, end))

    for length in map(int, np.flatnonzero(histogram)[::-1]):
        count = int(histogram[length])
        while count:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                needed = -(-count // (seq_length // length))
                put(seq_length, rows, rows + needed)
                rows += needed
                at = len(rooms) - 1
            room = rooms[at]
            begin, end = free[room].pop()
            if not free[room]:
                del free[room], rooms[at]
            each = room // length
            filled = min(end - begin, count // each)
            placed = filled * each
            if filled:
                plan.append(Placement(length, placed, begin, each))
                put(room - each * length, begin, begin + filled)
            begin += filled
            count -= placed
            if begin < end and count:  # fewer are left than fit into one row
                plan.append(Placement(length, count, begin, count))
                put(room - count * length, begin, begin + 1)
                begin, count = begin + 1, 0
            put(room, begin, end)
    return rows, plan
