"""What layers remember between tokens: one row of preallocated tensors per response."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

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
