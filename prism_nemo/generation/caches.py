"""What layers remember between tokens: one row of preallocated tensors per response."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F

from prism_nemo.generation.simd import LANES

# Bytes of a line of a core's cache.
_LINE = 64

# What a pass over prompts leaves behind for one layer, rows first.
Memory = tuple[torch.Tensor, ...]


class Cache(ABC):
    """The memory of one layer for a number of rows. A row is taken over by writing all that is read of it."""

    device: torch.device | None = None

    @abstractmethod
    def fill(self, memory: Memory, sources: torch.Tensor, first: int) -> None:
        """Put prompts into rows: row ``first + i`` gets ``memory[sources[i]]``."""

    @abstractmethod
    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy rows, all of them read before any is written; `length` is that of the longest in tokens."""

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row."""
        return

    def nbytes(self) -> int:
        """Memory that it takes."""
        return 0


class KeyValues(Cache):
    """Keys and values, [rows, groups, capacity, d] each; the token at position p of a response lies in column p.

    They start as zeros: a masked score adds minus infinity, and what was never written could be NaN.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.device = like.device

    def fill(self, memory: Memory, sources: torch.Tensor, first: int) -> None:
        """See `Cache.fill`."""
        for own, new in zip((self.keys, self.values), memory, strict=True):
            own[first : first + len(sources), :, : new.shape[2]] = new.index_select(0, sources)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """See `Cache.move`."""
        for own in (self.keys, self.values):
            used = own[:, :, :length]
            used.index_copy_(0, targets, used.index_select(0, sources))

    def grow(self, capacity: int) -> None:
        """See `Cache.grow`."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def nbytes(self) -> int:
        """See `Cache.nbytes`."""
        return self.keys.nbytes + self.values.nbytes


class PackedKeyValues(Cache):
    """Keys and values as `prism_nemo.generation.attention_kernel` reads them, [rows, blocks, groups, 16 * width] each.

    A block is 16 tokens; what a row reads lies in two stretches of memory. A group's part of a block is [width, 16] of
    keys, so that one vector holds a number of 16 of them, and [16, width] of values. The width is a head's, rounded up
    to a multiple of 16 with zeros. A block is undefined until its first token is written; from then on the values that
    are still missing are zeros.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        rows, self.groups, capacity, self.d = shape
        self.width = -(-self.d // LANES) * LANES
        self.dtype, self.device = like.dtype, like.device
        self.keys, self.values = self._room(rows, capacity), self._room(rows, capacity)

    def _room(self, rows: int, capacity: int) -> torch.Tensor:
        """Memory from numpy, which asks the system for large pages, and from where a line of the core's cache begins.

        With small pages attention takes 1.2 times as long; memory that is not touched is not taken.
        """
        shape = rows, -(-capacity // LANES), self.groups, LANES * self.width
        size = math.prod(shape) * self.dtype.itemsize
        raw = np.empty(size + _LINE, np.uint8)
        skipped = -raw.ctypes.data % _LINE
        return torch.from_numpy(raw[skipped : skipped + size]).view(self.dtype).view(shape)

    def fill(self, memory: Memory, sources: torch.Tensor, first: int) -> None:
        """See `Cache.fill`."""
        for own, new in zip((self.keys, self.values), memory, strict=True):
            length = -(-new.shape[2] // LANES) * LANES
            missing = length - new.shape[2], self.width - self.d
            new = F.pad(new, (0, missing[1], 0, missing[0])) if any(missing) else new
            cut = new.view(len(new), self.groups, -1, LANES, self.width).transpose(1, 2)
            cut = cut.transpose(3, 4) if own is self.keys else cut
            own[first : first + len(sources), : length // LANES] = cut.flatten(3).index_select(0, sources)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """See `Cache.move`."""
        for own in (self.keys, self.values):
            used = own[:, : -(-length // LANES)]
            used.index_copy_(0, targets, used.index_select(0, sources))

    def grow(self, capacity: int) -> None:
        """See `Cache.grow`."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._room(len(old), capacity)
            new[:, : old.shape[1]] = old
            setattr(self, name, new)

    def nbytes(self) -> int:
        """See `Cache.nbytes`."""
        return self.keys.nbytes + self.values.nbytes


class State(Cache):
    """A Mamba mixer's last inputs of the convolution [rows, width - 1, channels] and state [rows, groups, n, heads of a
    group * p].
    """

    def __init__(self, window: tuple[int, int, int], state: tuple[int, int, int, int], like: torch.Tensor) -> None:
        self.window, self.device = like.new_zeros(window), like.device
        self.state = like.new_zeros(state, dtype=torch.promote_types(like.dtype, torch.float32))

    def fill(self, memory: Memory, sources: torch.Tensor, first: int) -> None:
        """See `Cache.fill`."""
        for own, new in zip((self.window, self.state), memory, strict=True):
            own[first : first + len(sources)] = new.index_select(0, sources)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """See `Cache.move`."""
        for own in (self.window, self.state):
            own.index_copy_(0, targets, own.index_select(0, sources))

    def nbytes(self) -> int:
        """See `Cache.nbytes`."""
        return self.window.nbytes + self.state.nbytes


class Nothing(Cache):
    """Of an MLP."""

    def fill(self, memory: Memory, sources: torch.Tensor, first: int) -> None:
        """See `Cache.fill`."""

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """See `Cache.move`."""
