"""Packed documents: attention in groups against its definition, and whole models against each document alone.

Tolerances: fp64 sums of some hundred terms agree to 1e-12 of the largest value; whole models in fp32 as in
test_against_transformers.py. Isolation has no tolerance: it is exact.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from packed_workers import documents_alone, leaks, train_packed
from tiny_models import save_tiny

from prism_nemo.config import ParallelConfig
from prism_nemo.models.layers.attention import SDPACoreAttention
from prism_nemo.models.layers.documents import MAX_PADDING, documents_of, group_lengths, pack_documents
from prism_nemo.runtime.launch import launch

LOSS, GRADIENTS, VISIBLE = 1e-5, 1e-4, 1e-3
HEADS, DIM, THETA = 4, 8, 50.0
INV_FREQ = THETA ** -(torch.arange(0, DIM, 2).float() / DIM)


def core_attention(window: int | None, scale: float | None, rope: bool, dropout: float = 0.0) -> SDPACoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        attention_dropout=dropout,
        window_size=None if window is None else (window - 1, 0),
    )
    return SDPACoreAttention(
        config, 1, AttnMaskType.causal, "self", softmax_scale=scale, inv_freq=INV_FREQ if rope else None
    )


def definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    window: int | None,
    scale: float | None,
    rope: bool,
) -> torch.Tensor:
    """All pairs of tokens of the row, most of them masked; rotation as multiplication by complex numbers."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])
    if rope:
        # The angles as the layer has them, in fp32: what is compared is what is done with them.
        angles = torch.outer(position.float(), INV_FREQ)
        turn = torch.complex(angles.cos().to(q.dtype), angles.sin().to(q.dtype))[:, None]
        q, k = (turn * torch.complex(*x.chunk(2, dim=-1)) for x in (q, k))
        q, k = (torch.cat((x.real, x.imag), dim=-1) for x in (q, k))
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    distance = position[:, None] - position[None]
    seen = (document[:, None] == document[None]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = torch.einsum("ihd,jhd->hij", q, k) * (DIM**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(1)


def inputs(tokens: int, groups: int) -> list[torch.Tensor]:
    """Query, key and value as Megatron cuts them from one projection: views with gaps."""
    generator = torch.Generator().manual_seed(tokens)
    width = (HEADS // groups + 2) * DIM
    projected = torch.randn(tokens, groups, width, dtype=torch.float64, generator=generator)
    q, k, v = projected.split([HEADS // groups * DIM, DIM, DIM], dim=-1)
    return [x.requires_grad_() for x in (q.reshape(tokens, HEADS, DIM).detach(), k.detach(), v.detach())]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item())


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(any),
    window=st.sampled_from([None, 1, 5, 16]),
    groups=st.sampled_from([4, 2, 1]),
    scale=st.sampled_from([None, 0.7]),
    rope=st.booleans(),
)
@example([1], None, 4, None, True)
@example([1] * 9, 5, 2, None, True)
@example([130], None, 1, 0.7, True)  # one document fills the row
@example([5, 6, 6, 5, 6], 5, 2, None, True)  # a group of documents as long as the window and longer
@example([16, 17, 15, 17, 300, 298], 16, 2, None, True)  # a window's blocks of 128 queries, in a group
@settings(deadline=None, max_examples=60)
def test_groups_are_the_definition(
    lengths: list[int], window: int | None, groups: int, scale: float | None, rope: bool
) -> None:
    ours, theirs = inputs(sum(lengths), groups), inputs(sum(lengths), groups)
    packed = pack_documents([0, *np.cumsum(lengths).tolist()])
    out = core_attention(window, scale, rope)(*ours, None, packed_seq_params=packed)
    exact = definition(*theirs, lengths, window, scale, rope)
    assert difference(out, exact) <= 1e-12
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    (out * weight).sum().backward()
    (exact * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert difference(a.grad, b.grad) <= 1e-12


@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=30), data=st.data())
@settings(deadline=None, max_examples=30)
def test_nothing_of_a_document_reaches_another(lengths: list[int], data: st.DataObject) -> None:
    """Not even what spreads through masks and products with zero: a number that is none."""
    broken = data.draw(st.integers(0, len(lengths) - 1))
    packed = pack_documents([0, *np.cumsum(lengths).tolist()])
    own = packed.seq_idx[0] == broken
    layer, results = core_attention(5, None, True), []
    for value in (1.0, math.nan):
        tensors = inputs(sum(lengths), 2)
        with torch.no_grad():
            for x in tensors:
                x[own] = value
        out = layer(*tensors, None, packed_seq_params=packed)
        out.sum().backward()
        assert bool(out[own].isnan().any()) == math.isnan(value)
        results.append((out, *(x.grad for x in tensors)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[~own], b[~own])


def test_dropout_is_on_in_training_alone() -> None:
    packed = pack_documents([0, 5, 12, 17])
    tensors = inputs(17, 2)
    layer = core_attention(None, None, True, dropout=0.5)
    kept = layer.eval()(*tensors, None, packed_seq_params=packed)
    assert difference(kept, definition(*tensors, [5, 7, 5], None, None, True)) <= 1e-12
    assert difference(layer.train()(*tensors, None, packed_seq_params=packed), kept) > 1e-2


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=200), width=st.sampled_from([32, 4096]))
@settings(deadline=None, max_examples=50)
def test_groups_hold_every_document_once_and_little_padding(lengths: list[int], width: int) -> None:
    groups = group_lengths(np.array(lengths), width)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for members in groups:
        own = np.array(lengths)[members]
        assert len(own) * own.max() <= (1 + MAX_PADDING) * own.sum()


def test_groups_are_few_for_short_documents_and_tight_for_long_ones() -> None:
    generator = np.random.default_rng(0)
    short = generator.integers(8, 61, 150)
    assert len(group_lengths(short, 128)) <= 12
    assert len(group_lengths(np.full(150, 33), 128)) == 1
    assert len(group_lengths(np.array([2000, 1900, 1800]), 4096)) == 3  # padding costs more than a call


def test_rows_are_cut_only_where_documents_begin() -> None:
    assert pack_documents([0, 100, 256, 300, 512]).rows == 2
    assert pack_documents([0, 128, 256, 300, 384, 512]).rows == 4
    assert pack_documents([0, 128, 250, 384, 512]).rows == 1
    assert pack_documents(list(range(0, 513, 8))).rows == 4  # no shorter than 128
    assert pack_documents([0, 200, 500]).rows == 1  # not equal
    assert pack_documents([0, 7]).rows == 1


@pytest.mark.parametrize(
    ("ends", "tokens", "message"),
    [
        ([1, 5], None, "first document must begin at 0, not at 1"),
        ([0, 5, 3, 9], None, "document 1 begins at 5 but ends before it, at 3"),
        ([0, 5], 6, "documents end at 5, but the row has 6 tokens"),
        ([0], None, "integers"),
        ([0, 0], None, "no document has a token"),
        ([0.0, 5.0], None, "integers"),
        ([[0, 5]], None, "integers"),
    ],
)
def test_wrong_bounds_are_refused(ends: list[int], tokens: int | None, message: str) -> None:
    for given_ends in (ends, torch.tensor(ends)):
        with pytest.raises(ValueError, match=message):
            pack_documents(given_ends, tokens)


def test_documents_are_as_megatron_wants_them() -> None:
    packed = pack_documents(torch.tensor([0, 3, 3, 8, 8], dtype=torch.int32), tokens=8)
    assert isinstance(packed, PackedSeqParams)
    assert packed.qkv_format == "thd"
    for ends in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert ends.dtype == torch.int32
        assert ends.tolist() == [0, 3, 8]
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (5, 5)
    assert packed.seq_idx.dtype == torch.int32
    assert packed.seq_idx.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]


def test_megatrons_own_class_is_prepared_once_and_never_stale() -> None:
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    plain = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends)
    first = documents_of(plain, 8)
    assert documents_of(plain, 8) is first
    ends.copy_(torch.tensor([0, 5, 8]))  # written to
    assert documents_of(plain, 8).bounds.tolist() == [0, 5, 8]
    assert first.cu_seqlens_q.tolist() == [0, 3, 8]
    plain.cu_seqlens_q = torch.tensor([0, 8], dtype=torch.int32)  # replaced
    assert documents_of(plain, 8).bounds.tolist() == [0, 8]
    plain.cu_seqlens_q_padded = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert documents_of(plain, 12).bounds.tolist() == [0, 4, 12]
    with pytest.raises(ValueError, match="documents end at 12, but the row has 8 tokens"):
        documents_of(plain, 8)


def test_bounds_are_copied() -> None:
    """A loader may fill one buffer anew for each micro-batch while the backward passes of others are to come."""
    buffer = torch.tensor([0, 3, 8], dtype=torch.int32)
    tensors, exact = inputs(8, 2), inputs(8, 2)
    packed = pack_documents(buffer)
    buffer.copy_(torch.tensor([0, 6, 8]))
    out = core_attention(None, None, True)(*tensors, None, packed_seq_params=packed)
    assert difference(out, definition(*exact, [3, 5], None, None, True)) <= 1e-12


CASES = ["llama", "mistral-window", "granite-hybrid", "nemotron-h"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    root: Path = tmp_path_factory.mktemp("packed")
    made = {}
    for case in CASES:
        folder = save_tiny(case, root / case)
        made[case] = (str(folder), str(documents_alone(folder, root / f"{case}.pt")))
    return made


LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(2),
    "tp2-sp": ParallelConfig(2, sequence_parallel=True),
    "pp2": ParallelConfig(1, 2),
    "pp4": ParallelConfig(1, 4),  # two stages that have neither the embedding nor the loss
    "pp2-vpp2": ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=2),
    # Documents lie across the cuts, one of 128 tokens over a quarter of the row and one of 72 from share to share.
    "cp2": ParallelConfig(context_parallel_size=2),
    "cp4": ParallelConfig(context_parallel_size=4),  # more ranks than groups of keys and values, and of B and C
    "tp2-cp2": ParallelConfig(2, context_parallel_size=2),
    "tp2-sp-cp2": ParallelConfig(2, sequence_parallel=True, context_parallel_size=2),
    "pp2-cp2": ParallelConfig(1, 2, context_parallel_size=2),
}
SLOW = {"tp2-cp2", "tp2-sp-cp2", "cp4"}  # four processes each; pp2-cp2 and cp2 are in the short suite


@pytest.mark.parametrize("layout", [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in LAYOUTS])
def test_packed_micro_batches_are_their_documents_alone(layout: str, folders: dict[str, tuple[str, str]]) -> None:
    """With two middle stages also once more, one of them faulty: that must show."""
    parallel = LAYOUTS[layout]
    stages = (None, 2) if layout == "pp4" else (None,)
    errors, *faulty = launch(train_packed, folders, parallel, stages, processes=parallel.world_size)
    assert errors.keys() == folders.keys()
    for case, (loss, gradients) in errors.items():
        assert loss <= LOSS, case
        assert gradients <= GRADIENTS, case
        assert all(f[case][1] > VISIBLE for f in faulty), case


@pytest.mark.slow
def test_eight_parts_on_four_stages(folders: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """Six parts have neither the embedding nor the loss; the dense model gets eight layers for it."""
    deep = save_tiny("llama-tied", tmp_path / "deep", num_hidden_layers=8)
    chosen = {
        "granite-hybrid": folders["granite-hybrid"],
        "deep": (str(deep), str(documents_alone(deep, tmp_path / "pt"))),
    }
    layout = ParallelConfig(1, 4, virtual_pipeline_model_parallel_size=2)
    (errors,) = launch(train_packed, chosen, layout, processes=4)
    for case, (loss, gradients) in errors.items():
        assert loss <= LOSS, case
        assert gradients <= GRADIENTS, case


def test_other_documents_do_not_move_at_all(folders: dict[str, tuple[str, str]]) -> None:
    moved = launch(leaks, folders)
    assert moved == {(case, kind): 0.0 for case in CASES for kind in ("PackedDocuments", "PackedSeqParams")}
