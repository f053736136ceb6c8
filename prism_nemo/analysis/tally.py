"""Counts and sums of how weights changed, which add up over blocks, tensors and groups of tensors."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from prism_nemo.analysis.passes import (
    EXPONENTS,
    LEVELS,
    MAGNITUDES,
    change,
    limits,
    same_in_bf16,
    together,
)
from prism_nemo.analysis.sources import DTYPES, Weights

Array = np.ndarray
_LIMITS = {torch.float32: limits(np.float32), torch.float64: limits(np.float64)}


@dataclass
class Table:
    """How many weights there are of each magnitude and level.

    Attributes:
        magnitudes: [k] int64: the magnitudes that occur, as the upper 15 bits after the sign of an fp32 number.
        counts: [k, LEVELS] int64.
    """

    magnitudes: Array = field(default_factory=lambda: np.empty(0, np.int64))
    counts: Array = field(default_factory=lambda: np.empty((0, LEVELS), np.int64))

    @classmethod
    def of(cls, dense: Array) -> Table:
        """From a table of all magnitudes, [MAGNITUDES * LEVELS]."""
        square = dense.reshape(MAGNITUDES, LEVELS)
        found = np.flatnonzero(square.any(axis=1))
        return cls(found, square[found].astype(np.int64))

    @classmethod
    def sum(cls, tables: Iterable[Table]) -> Table:
        """Of disjoint sets of weights together."""
        dense = np.zeros((MAGNITUDES, LEVELS), np.int64)
        for table in tables:
            dense[table.magnitudes] += table.counts
        return cls.of(dense)


@dataclass
class Tally:
    """How a set of weights changed.

    Attributes:
        parameters: Number of weights.
        before: Sum of a^2, in fp64.
        change: Sum of (b - a)^2.
        along: Sum of a (b - a).
        flips: Weights that changed their sign.
        bf16_equal: Weights that are equal once both are rounded to bf16.
        table: By magnitude of a, and by level.
    """

    parameters: int = 0
    before: float = 0.0
    change: float = 0.0
    along: float = 0.0
    flips: int = 0
    bf16_equal: int = 0
    table: Table = field(default_factory=Table)

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """Of disjoint sets of weights together."""
        found = list(tallies)
        return cls(
            sum(t.parameters for t in found), sum(t.before for t in found), sum(t.change for t in found),
            sum(t.along for t in found), sum(t.flips for t in found), sum(t.bf16_equal for t in found),
            Table.sum(t.table for t in found),
        )  # fmt: skip


@dataclass
class JointTally:
    """How two updates of the same weights lie to each other.

    Attributes:
        product: Sum of the products of both changes, in fp64.
        table: [EXPONENTS, LEVELS, LEVELS, 2] int64: exponent of the first update's weight before, level in the first
            update, in the second, and whether both moved the same way.
    """

    product: float = 0.0
    table: Array = field(default_factory=lambda: np.zeros((EXPONENTS, LEVELS, LEVELS, 2), np.int64))

    def add(self, other: JointTally) -> None:
        """Weights that are not among these."""
        self.product += other.product
        self.table += other.table


class _Loaded:
    """A block of one checkpoint in a type that can be computed with.

    Attributes:
        single: The block in fp32.
        bits: The same as uint32.
        double: The same in fp64, where it is asked for.
    """

    def __init__(self, elements: int) -> None:
        self._single = torch.empty(elements, dtype=torch.float32)
        self.single = self._single.numpy()
        self.bits = self.single.view(np.uint32)
        self._double = torch.empty(0, dtype=torch.float64)
        self.double = self._double.numpy()
        self._stored: dict[torch.dtype, torch.Tensor] = {}

    def load(self, weights: Weights, name: str, first: int, rows: int, row: tuple[int, ...], wide: bool) -> int:
        """Read rows; in fp64 too if `wide`. Returns how many weights there are."""
        dtype, length = DTYPES[weights.dtype(name)], rows * math.prod(row)
        if dtype not in self._stored:
            self._stored[dtype] = torch.empty(len(self._single), dtype=dtype)
        raw = self._stored[dtype][:length]
        weights.read(name, first, raw.view(rows, *row))
        self._single[:length].copy_(raw)
        if wide:
            if len(self._double) < length:
                self._double = torch.empty(len(self._single), dtype=torch.float64)
                self.double = self._double.numpy()
            self._double[:length].copy_(raw)
        return length


class Workspace(threading.local):
    """Buffers of a thread; what one task needs of memory, whatever the model's size."""

    def __init__(self) -> None:
        self.elements = 0
        self.loaded: list[_Loaded] = []
        self.level: list[Array] = []
        self.tables: list[Array] = []
        self.joint: list[Array] = []

    def make(self, checkpoints: int, transitions: int, pairs: int, elements: int) -> None:
        """Room for so many."""
        if elements > self.elements or len(self.loaded) < checkpoints:
            self.loaded = [_Loaded(elements) for _ in range(checkpoints)]
            self.level = [np.empty(elements, np.uint8) for _ in range(transitions)]
            self.elements = elements
        if len(self.tables) < transitions:
            self.tables = [np.zeros(MAGNITUDES * LEVELS, np.uint32) for _ in range(transitions)]
            self.level = [np.empty(self.elements, np.uint8) for _ in range(transitions)]
        if len(self.joint) < pairs:
            self.joint = [np.zeros(EXPONENTS * LEVELS * LEVELS * 2, np.uint32) for _ in range(pairs)]


def tally_rows(
    space: Workspace,
    checkpoints: list[Weights],
    transitions: list[tuple[int, int]],
    pairs: list[tuple[int, int]],
    name: str,
    first: int,
    rows: int,
    block: int,
) -> tuple[list[Tally], list[JointTally]]:
    """Tally a stretch of rows of one tensor, read once from each checkpoint.

    Args:
        space: Of the calling thread.
        checkpoints: Whose tensors have the same names and shapes.
        transitions: (before, after), as indices of checkpoints.
        pairs: Of transitions, as indices, that are compared with each other.
        name: Of the tensor.
        first: First row.
        rows: How many; fewer than 2^32 weights.
        block: Weights that are held at a time.
    """
    shape = checkpoints[0].shape(name)
    row = tuple(shape[1:])
    size = math.prod(row)
    step = max(1, block // max(1, size))
    space.make(len(checkpoints), len(transitions), len(pairs), step * size)
    kinds = [weights.dtype(name) for weights in checkpoints]
    tallies = [Tally() for _ in transitions]
    joints = [JointTally() for _ in pairs]
    for table in (*space.tables[: len(transitions)], *space.joint[: len(pairs)]):
        table.fill(0)
    wide = any(kind != "BF16" for kind in kinds)
    factors = _LIMITS[torch.float64 if wide else torch.float32]
    for start in range(first, first + rows, step):
        count_rows = min(step, first + rows - start)
        loaded = space.loaded[: len(checkpoints)]
        for weights, into in zip(checkpoints, loaded, strict=True):
            length = into.load(weights, name, start, count_rows, row, wide)
        exact = [(into.double if wide else into.single)[:length] for into in loaded]
        bits = [into.bits[:length] for into in loaded]
        for t, (a, b) in enumerate(transitions):
            found = change(exact[a], exact[b], bits[a], factors, space.level[t][:length], space.tables[t])
            _add(tallies[t], length, found)
            if wide:
                tallies[t].bf16_equal += int(same_in_bf16(bits[a], bits[b]))
        for p, (one, two) in enumerate(pairs):
            (a, b), (c, d) = transitions[one], transitions[two]
            both = space.level[one][:length], space.level[two][:length]
            joints[p].product += float(together(exact[a], exact[b], exact[c], exact[d], *both, bits[a], space.joint[p]))
    for t, tally in enumerate(tallies):
        tally.table = Table.of(space.tables[t])
        if not wide:  # two numbers in bf16 are what they are rounded to
            tally.bf16_equal = int(tally.table.counts[:, 0].sum())
    for p, joint in enumerate(joints):
        joint.table = space.joint[p].astype(np.int64).reshape(EXPONENTS, LEVELS, LEVELS, 2)
    return tallies, joints


def _add(tally: Tally, parameters: int, found: tuple[float, float, float, int]) -> None:
    tally.parameters += parameters
    tally.before += found[0]
    tally.change += found[1]
    tally.along += found[2]
    tally.flips += int(found[3])


def stretches(rows: int, row: int, most: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of pieces of at most `most` weights, at least a row each."""
    step = max(1, most // max(1, row))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)
