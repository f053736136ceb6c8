"""How a Megatron-Core parameter lies in Hugging Face tensors, for every tensor-parallel rank.

Whatever the layer, a parameter is a sequence of *runs*: consecutive rows of one Hugging Face tensor, possibly only some
of their columns. A mapping states the runs of one rank's part; reading a slice of a file, writing an export, checking
shapes and comparing weights all follow from that one statement.

"Full" below means the Megatron parameter as it is with tensor_model_parallel_size = 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from prism_nemo.errors import InputError


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one Hugging Face tensor.

    Attributes:
        source: Index into the mapping's `hf`; None for rows of zeros, which no tensor holds.
        start: First row.
        rows: How many.
    """

    source: int | None
    start: int
    rows: int


@dataclass(frozen=True)
class WeightMapping(ABC):
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    Attributes:
        megatron: Parameter name with local layer specs; ``{layer}`` stands for the layer index.
        hf: Hugging Face tensor names; ``{layer}`` stands for the index of the Hugging Face layer.
        shape: Of the full Megatron parameter.
        layers: Megatron's global layer indices that have this parameter; None for one that belongs to no layer.
        block: Megatron layers to one Hugging Face layer (a hybrid's mixer and MLP are layers of their own).
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)
    block: int = field(default=1, kw_only=True)

    def at(self, layer: int | None) -> tuple[str, tuple[str, ...]]:
        """Names with Megatron's layer index, and the Hugging Face layer that it belongs to, filled in."""
        if layer is None:
            return self.megatron, self.hf
        return self.megatron.format(layer=layer), tuple(name.format(layer=layer // self.block) for name in self.hf)

    @abstractmethod
    def runs(self, rank: int, size: int) -> tuple[Run, ...]:
        """The rows of rank `rank` of `size`, in the order in which its parameter holds them.

        Raises:
            InputError: If the parameter cannot be cut into `size` parts.
        """

    def columns(self, rank: int, size: int) -> tuple[int, int]:
        """First and last-plus-one column (second dimension) of the rank's part; (0, 0) for vectors."""
        return (0, self.shape[1]) if len(self.shape) > 1 else (0, 0)

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of the rank's part."""
        first, last = self.columns(rank, size)
        rows = sum(run.rows for run in self.runs(rank, size))
        return (rows, *((last - first, *self.shape[2:]) if len(self.shape) > 1 else ()))

    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the Hugging Face tensors, in the order of `hf`.

        A gate of 60 rows and an up projection of 68 have the 128 rows that [gate; up] needs, and would load; so every
        tensor is checked by itself.
        """
        rows = [0] * len(self.hf)
        for run in self.runs(0, 1):
            if run.source is not None:
                rows[run.source] = max(rows[run.source], run.start + run.rows)
        return tuple((n, *self.shape[1:]) for n in rows)

    def to_megatron(self, tensors: tuple[torch.Tensor, ...], rank: int = 0, size: int = 1) -> torch.Tensor:
        """Whole Hugging Face tensors, in the order of `hf`, to the rank's part of the parameter."""
        first, last = self.columns(rank, size)
        parts = []
        for run in self.runs(rank, size):
            if run.source is None:
                parts.append(tensors[0].new_zeros((run.rows, *self.local_shape(rank, size)[1:])))
                continue
            part = tensors[run.source][run.start : run.start + run.rows]
            parts.append(part[:, first:last] if part.dim() > 1 else part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to_hf(self, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The full parameter to Hugging Face tensors, in the order of `hf`."""
        pieces: list[list[tuple[int, torch.Tensor]]] = [[] for _ in self.hf]
        row = 0
        for run in self.runs(0, 1):
            if run.source is not None:
                pieces[run.source].append((run.start, full[row : row + run.rows]))
            row += run.rows
        ordered = [[part for _, part in sorted(parts, key=lambda pair: pair[0])] for parts in pieces]
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in ordered)

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The part of the full parameter that tensor-parallel rank `rank` of `size` owns."""
        return self.to_megatron(self.to_hf(full), rank, size)


def expand(table: Iterable[WeightMapping]) -> Iterator[tuple[WeightMapping, int | None]]:
    """Each mapping with each Megatron layer that it stands for (None where it stands for no layer)."""
    for mapping in table:
        if mapping.layers is None:
            yield mapping, None
        else:
            for layer in mapping.layers:
                yield mapping, layer


def _share(length: int, size: int, shape: tuple[int, ...]) -> int:
    if length % size:
        raise InputError(f"tensor_model_parallel_size {size} does not divide a weight of shape {shape}")
    return length // size


@dataclass(frozen=True)
class Replicated(WeightMapping):
    """The same rows on every rank (norms).

    Attributes:
        start: First row in the Hugging Face tensor.
    """

    start: int = 0

    def runs(self, rank: int, size: int) -> tuple[Run, ...]:
        """Every rank owns all of it."""
        return (Run(0, self.start, self.shape[0]),)


@dataclass(frozen=True)
class ColumnParallel(WeightMapping):
    """Input projections and per-channel vectors: cut along the rows, each section on its own.

    Attributes:
        sections: (first row, rows) in the Hugging Face tensor, in the parameter's order; all rows if empty. A
            projection to several things, such as a Mamba mixer's [z; x; B; C; dt], gives each rank its share of each.
    """

    sections: tuple[tuple[int, int], ...] = ()

    def runs(self, rank: int, size: int) -> tuple[Run, ...]:
        """A share of each section."""
        runs = []
        for start, rows in self.sections or ((0, self.shape[0]),):
            share = _share(rows, size, self.shape)
            runs.append(Run(0, start + rank * share, share))
        return tuple(runs)


@dataclass(frozen=True)
class RowParallel(Replicated):
    """Output projections: cut along the input dimension."""

    def columns(self, rank: int, size: int) -> tuple[int, int]:
        """[out, in] -> [out, in / size]."""
        share = _share(self.shape[1], size, self.shape)
        return rank * share, (rank + 1) * share


@dataclass(frozen=True)
class VocabParallel(WeightMapping):
    """Embedding and output layer: padded to a multiple of the tensor-parallel size, cut along the vocabulary.

    Padding rows are zero on import and dropped on export. Their logits exist in Megatron and must be ignored there:
    see `prism_nemo.models.decoder.Decoder`, which masks them.
    """

    vocab_size: int = 0

    def runs(self, rank: int, size: int) -> tuple[Run, ...]:
        """[vocab, hidden] -> [padded vocab / size, hidden]."""
        share = _share(self.shape[0], size, self.shape)
        first = min(rank * share, self.vocab_size)
        real = min(share, self.vocab_size - first)
        runs = (Run(0, first, real), Run(None, 0, share - real))
        return tuple(run for run in runs if run.rows)


@dataclass(frozen=True)
class GatedMLP(WeightMapping):
    """Gate and up projections in one matrix, [gate; up]; each half is cut on its own: a rank holds [gate_r; up_r].

    Hugging Face keeps them as two tensors, or as one in the same order (Granite 4).
    """

    def runs(self, rank: int, size: int) -> tuple[Run, ...]:
        """The rank's share of the gate, then of the up projection."""
        width = self.shape[0] // 2
        share = _share(width, size, self.shape)
        up = Run(1, rank * share, share) if len(self.hf) == 2 else Run(0, width + rank * share, share)
        return (Run(0, rank * share, share), up)


@dataclass(frozen=True)
class FusedQKV(WeightMapping):
    """Query, key and value in one matrix, interleaved by group: [q_1..q_r, k, v] for each of the `groups` K/V heads.

    `hf` names query, key and value, in this order.
    """

    heads: int = 0
    groups: int = 0
    head_dim: int = 0

    def runs(self, rank: int, size: int) -> tuple[Run, ...]:
        """Whole groups go to a rank."""
        if self.groups % size:
            raise InputError(f"tensor_model_parallel_size {size} does not divide the {self.groups} key/value heads")
        share, d = self.groups // size, self.head_dim
        q = self.heads // self.groups * d
        return tuple(
            run
            for group in range(rank * share, (rank + 1) * share)
            for run in (Run(0, group * q, q), Run(1, group * d, d), Run(2, group * d, d))
        )
