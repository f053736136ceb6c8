"""The kinds of weight mapping between Hugging Face and Megatron-Core, and their tensor-parallel cuts.

A mapping joins one Megatron parameter to one or more Hugging Face tensors, in both directions. Every family's table is
a list of these, and the same table serves import, export, verification and weight analysis.

"Full" below means the Megatron parameter as it would be with tensor_model_parallel_size = 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass

import torch

from prism_nemo.errors import InputError

Tensors = MappingABC[str, torch.Tensor]


@dataclass(frozen=True)
class WeightMapping(ABC):
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    Attributes:
        megatron: Parameter name in a GPTModel with local layer specs; ``{layer}`` stands for the global layer index.
        hf: Hugging Face tensor names, with the same placeholder.
        shape: Of the full Megatron parameter; the shapes of the Hugging Face tensors follow from it.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def per_layer(self) -> bool:
        """Whether the mapping is repeated for each layer."""
        return "{layer}" in self.megatron

    def at(self, layer: int | None) -> tuple[str, tuple[str, ...]]:
        """Names with the layer filled in."""
        if not self.per_layer:
            return self.megatron, self.hf
        return self.megatron.format(layer=layer), tuple(name.format(layer=layer) for name in self.hf)

    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the Hugging Face tensors, in the order of `hf`.

        A gate of 60 rows and an up projection of 68 have the 128 rows that [gate; up] needs, and would load; so every
        tensor is checked by itself.
        """
        return tuple(tuple(part.shape) for part in self.to_hf(torch.empty(self.shape, device="meta")))

    @abstractmethod
    def to_megatron(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Hugging Face tensors, in the order of `hf`, to the full Megatron parameter."""

    @abstractmethod
    def to_hf(self, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The full Megatron parameter to Hugging Face tensors, in the order of `hf`."""

    @abstractmethod
    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The part of the full parameter that tensor-parallel rank `rank` of `size` owns."""


def _cut(full: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    if full.shape[dim] % size:
        raise InputError(f"tensor_model_parallel_size {size} does not divide a weight of shape {tuple(full.shape)}")
    return full.chunk(size, dim=dim)[rank]


@dataclass(frozen=True)
class Replicated(WeightMapping):
    """The same tensor on every rank (norms)."""

    def to_megatron(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """[n] -> [n]."""
        return tensors[0]

    def to_hf(self, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[n] -> [n]."""
        return (full,)

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """Every rank owns all of it."""
        return full


@dataclass(frozen=True)
class RowParallel(Replicated):
    """Output projections: cut along the input dimension."""

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """[out, in] -> [out, in / size]."""
        return _cut(full, 1, rank, size)


@dataclass(frozen=True)
class VocabParallel(Replicated):
    """Embedding and output layer: padded to a multiple of the tensor-parallel size, cut along the vocabulary.

    Padding rows are zero on import and dropped on export. Their logits exist in Megatron and must be ignored there:
    see `prism_nemo.models.build.GPT`, which masks them.
    """

    vocab_size: int = 0

    def to_megatron(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """[vocab, hidden] -> [padded vocab, hidden]."""
        (weight,) = tensors
        return torch.nn.functional.pad(weight, (0, 0, 0, self.shape[0] - self.vocab_size))

    def to_hf(self, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[padded vocab, hidden] -> [vocab, hidden]."""
        return (full[: self.vocab_size],)

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """[padded vocab, hidden] -> [padded vocab / size, hidden]."""
        return _cut(full, 0, rank, size)


@dataclass(frozen=True)
class GatedMLP(WeightMapping):
    """Gate and up projections in one matrix, [gate; up]; each half is cut on its own: a rank holds [gate_r; up_r]."""

    def to_megatron(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """2 x [ffn, hidden] -> [2 ffn, hidden]."""
        return torch.cat(tensors, dim=0)

    def to_hf(self, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[2 ffn, hidden] -> 2 x [ffn, hidden]."""
        return full.chunk(2, dim=0)

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """[2 ffn, hidden] -> [2 ffn / size, hidden]."""
        return torch.cat([_cut(half, 0, rank, size) for half in full.chunk(2, dim=0)], dim=0)


@dataclass(frozen=True)
class FusedQKV(WeightMapping):
    """Query, key and value in one matrix, interleaved by group: [q_1..q_r, k, v] for each of the `groups` K/V heads."""

    heads: int = 0
    groups: int = 0
    head_dim: int = 0

    def to_megatron(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """[heads d, h], [groups d, h], [groups d, h] -> [(heads + 2 groups) d, h]."""
        q, k, v = tensors
        hidden = q.shape[1:]
        per_group = self.heads // self.groups
        fused = torch.cat(
            [
                q.reshape(self.groups, per_group * self.head_dim, *hidden),
                k.reshape(self.groups, self.head_dim, *hidden),
                v.reshape(self.groups, self.head_dim, *hidden),
            ],
            dim=1,
        )
        return fused.reshape(-1, *hidden)

    def to_hf(self, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[(heads + 2 groups) d, h] -> [heads d, h], [groups d, h], [groups d, h]."""
        hidden = full.shape[1:]
        per_group = self.heads // self.groups
        grouped = full.reshape(self.groups, (per_group + 2) * self.head_dim, *hidden)
        parts = grouped.split([per_group * self.head_dim, self.head_dim, self.head_dim], dim=1)
        return tuple(part.reshape(-1, *hidden) for part in parts)

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """Whole groups go to a rank, so the interleaved matrix is cut along its first dimension."""
        if self.groups % size:
            raise InputError(f"tensor_model_parallel_size {size} does not divide the {self.groups} key/value heads")
        return _cut(full, 0, rank, size)
