"""Each kind of mapping: both directions, and what a tensor-parallel rank owns.

What a rank owns is checked against the meaning of tensor parallelism, not against the code: rank r of n must hold the
same parameter as a smaller model made of the r-th part of the heads (or of the MLP's rows) alone.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.errors import InputError
from prism_nemo.models.weights import FusedQKV, GatedMLP, Replicated, RowParallel, VocabParallel, expand

sizes = st.integers(1, 4)
settings.register_profile("prism", deadline=None, max_examples=60)
settings.load_profile("prism")


def numbered(*shape: int) -> torch.Tensor:
    """Every element different, so that no permutation goes unseen."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def parts(tensor: torch.Tensor, size: int, rank: int, dim: int = 0) -> torch.Tensor:
    step = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * step, step)


def qkv(heads: int, groups: int, head_dim: int, hidden: int) -> FusedQKV:
    shape = ((heads + 2 * groups) * head_dim, hidden)
    return FusedQKV("a", ("q", "k", "v"), shape, heads=heads, groups=groups, head_dim=head_dim)


@given(n=sizes, size=sizes, rank=st.integers(0, 3))
def test_replicated(n: int, size: int, rank: int) -> None:
    mapping = Replicated("a", ("b",), (n,))
    weight = numbered(n)
    assert mapping.hf_shapes() == ((n,),)
    full = mapping.to_megatron((weight,))
    assert torch.equal(mapping.to_hf(full)[0], weight)
    assert torch.equal(mapping.shard(full, min(rank, size - 1), size), weight)


@given(out=sizes, per_rank=sizes, size=sizes)
def test_row_parallel_is_cut_along_the_input(out: int, per_rank: int, size: int) -> None:
    mapping = RowParallel("a", ("b",), (out, per_rank * size))
    weight = numbered(out, per_rank * size)
    assert mapping.hf_shapes() == (weight.shape,)
    full = mapping.to_megatron((weight,))
    assert torch.equal(mapping.to_hf(full)[0], weight)
    shards = [mapping.shard(full, rank, size) for rank in range(size)]
    x = torch.randn(per_rank * size, generator=torch.Generator().manual_seed(0))
    partial = [shard @ parts(x, size, rank) for rank, shard in enumerate(shards)]
    torch.testing.assert_close(torch.stack(partial).sum(0), weight @ x)
    assert torch.equal(torch.cat(shards, dim=1), weight)


@given(vocab=st.integers(1, 17), hidden=sizes, size=sizes)
def test_vocab_parallel_pads_with_zeros_and_drops_them(vocab: int, hidden: int, size: int) -> None:
    padded = -(-vocab // size) * size
    mapping = VocabParallel("a", ("b",), (padded, hidden), vocab_size=vocab)
    weight = numbered(vocab, hidden) + 1
    assert mapping.hf_shapes() == (weight.shape,)
    full = mapping.to_megatron((weight,))
    assert full.shape == (padded, hidden)
    assert torch.equal(full[vocab:], torch.zeros(padded - vocab, hidden))
    assert torch.equal(mapping.to_hf(full)[0], weight)
    shards = [mapping.shard(full, rank, size) for rank in range(size)]
    assert {len(shard) for shard in shards} == {padded // size}
    assert torch.equal(torch.cat(shards), full)


@given(ffn_per_rank=sizes, hidden=sizes, size=sizes)
def test_gated_mlp_rank_holds_its_own_gate_and_up(ffn_per_rank: int, hidden: int, size: int) -> None:
    mapping = GatedMLP("a", ("gate", "up"), (2 * ffn_per_rank * size, hidden))
    gate = numbered(ffn_per_rank * size, hidden)
    up = -gate - 1
    assert mapping.hf_shapes() == (gate.shape, up.shape)
    full = mapping.to_megatron((gate, up))
    back = mapping.to_hf(full)
    assert torch.equal(back[0], gate)
    assert torch.equal(back[1], up)
    for rank in range(size):
        alone = mapping.to_megatron((parts(gate, size, rank), parts(up, size, rank)))
        assert torch.equal(mapping.shard(full, rank, size), alone)


@given(groups_per_rank=st.integers(1, 3), queries=sizes, head_dim=sizes, hidden=sizes, size=st.integers(1, 3))
def test_fused_qkv_rank_holds_its_own_heads(
    groups_per_rank: int, queries: int, head_dim: int, hidden: int, size: int
) -> None:
    groups = groups_per_rank * size
    mapping = qkv(groups * queries, groups, head_dim, hidden)
    q = numbered(groups * queries * head_dim, hidden)
    k = numbered(groups * head_dim, hidden) + 1e4
    v = numbered(groups * head_dim, hidden) + 2e4
    full = mapping.to_megatron((q, k, v))
    assert full.shape == mapping.shape
    assert mapping.hf_shapes() == (q.shape, k.shape, v.shape)
    for given_, back in zip((q, k, v), mapping.to_hf(full), strict=True):
        assert torch.equal(given_, back)
    small = qkv(groups_per_rank * queries, groups_per_rank, head_dim, hidden)
    for rank in range(size):
        alone = small.to_megatron(tuple(parts(t, size, rank) for t in (q, k, v)))
        assert torch.equal(mapping.shard(full, rank, size), alone)


def test_fused_qkv_order_is_megatrons() -> None:
    """Per K/V head: its query heads, the key, the value (megatron/core/transformer/attention.py splits it so)."""
    mapping = qkv(4, 2, 1, 1)
    q, k, v = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    assert mapping.to_megatron((q, k, v)).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_names_of_a_layer() -> None:
    mapping = Replicated("decoder.layers.{layer}.n", ("model.layers.{layer}.n",), (1,), layers=(6, 7), block=2)
    assert mapping.at(7) == ("decoder.layers.7.n", ("model.layers.3.n",))
    assert [layer for _, layer in expand([mapping])] == [6, 7]
    assert [layer for _, layer in expand([Replicated("final", ("model.norm",), (1,))])] == [None]
    assert Replicated("final", ("model.norm",), (1,)).at(None) == ("final", ("model.norm",))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match=r"tensor_model_parallel_size 3 does not divide .*\(4, 4\)"):
        RowParallel("a", ("b",), (4, 4)).shard(torch.zeros(4, 4), 0, 3)
    with pytest.raises(InputError, match="3 does not divide the 2 key/value heads"):
        qkv(6, 2, 1, 1).shard(torch.zeros(10, 1), 0, 3)
