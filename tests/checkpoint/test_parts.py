"""A rank's rows and columns, read from files, are those of the whole tensors mapped in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import every_kind
from safetensors.torch import save_file

from prism_nemo.checkpoint import safetensors_file
from prism_nemo.checkpoint.hf import BLOCK_BYTES, HFReader
from prism_nemo.checkpoint.importing import Part
from prism_nemo.checkpoint.placement import Shard
from prism_nemo.models.weights import FusedQKV, Replicated, RowParallel

small = st.integers(1, 3)


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(small, small, small),
    size=small,
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    budget=st.integers(1, 60),
)
def test_reading_by_runs_is_mapping_whole_tensors(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: tuple[int, int, int],
    size: int,
    data: st.DataObject,
    dtype: torch.dtype,
    budget: int,
) -> None:
    """Every kind of mapping on every rank: some rows at once, and all rows in blocks of any size."""
    for mapping in every_kind(*sizes, size):
        generator = torch.Generator().manual_seed(0)
        tensors = tuple(torch.randn(shape, generator=generator).to(dtype) for shape in mapping.hf_shapes())
        folder = tmp_path_factory.mktemp("hf")
        save_file(dict(zip(mapping.hf, tensors, strict=True)), folder / "model.safetensors")
        reader = HFReader(folder)
        for rank in range(size):
            expected = mapping.to_megatron(tensors, rank, size)
            assert mapping.local_shape(rank, size) == expected.shape
            first = data.draw(st.integers(0, len(expected) - 1))
            rows = data.draw(st.integers(1, len(expected) - first))
            out = torch.full((rows, *expected.shape[1:]), 77.0, dtype=dtype)
            reader.read_part(mapping, mapping.hf, rank, size, first, out)
            assert torch.equal(out, expected[first : first + rows])

            part = Part(reader, rank, size, strict=False)
            part._buffer = torch.empty(budget * 2, dtype=torch.uint8)  # down to blocks of one row
            shape = (len(expected) - first, *expected.shape[1:])
            shard = Shard("k", shape, (0,) * len(shape), shape, mapping, mapping.hf, first, 0, True)
            blocks = [block.clone() for block in part.blocks(shard, 0, len(expected) - first)]
            assert torch.equal(torch.cat(blocks), expected[first:])


@pytest.mark.parametrize("parallel", [False, True], ids=["rows", "columns"])
def test_no_tensor_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: bool) -> None:
    """A tensor of 8 MB is never in memory: not in one read, nor in one window of the file."""
    shape = (2048, 2048)
    save_file({"t": torch.zeros(shape, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    largest = 0
    read, window = safetensors_file.read_exactly, safetensors_file.window

    def seen_read(descriptor: int, into: object, position: int, path: Path) -> None:
        nonlocal largest
        largest = max(largest, len(into))  # type: ignore[arg-type]
        read(descriptor, into, position, path)  # type: ignore[arg-type]

    def seen_window(descriptor: int, start: int, size: int) -> safetensors_file.window:
        nonlocal largest
        largest = max(largest, size)
        return window(descriptor, start, size)

    monkeypatch.setattr(safetensors_file, "read_exactly", seen_read)
    monkeypatch.setattr(safetensors_file, "window", seen_window)
    size = 2 if parallel else 1
    mapping = RowParallel("p", ("t",), shape)
    part = Part(HFReader(tmp_path), 0, size, strict=False)
    local = mapping.local_shape(0, size)
    shard = Shard("k", local, (0, 0), local, mapping, ("t",), 0, 0, True)
    assert sum(len(block) for block in part.blocks(shard, 0, 2048)) == 2048
    assert 0 < largest <= BLOCK_BYTES * size


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    q, k, v = torch.ones(8, 3), torch.ones(4, 3), torch.ones(4, 3)
    k[3, 1] = value
    tensors = {name: t.to(dtype) for name, t in {"q": q, "k": k, "v": v}.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    mapping = FusedQKV("p", ("q", "k", "v"), (16, 3), heads=4, groups=2, head_dim=2)
    part = Part(HFReader(tmp_path), 0, 1, strict=False)
    shard = Shard("k", (16, 3), (0, 0), (16, 3), mapping, mapping.hf, 0, 0, True)
    list(part.blocks(shard, 0, 16))
    assert part.not_finite == {"k"}


def test_large_numbers_are_finite(tmp_path: Path) -> None:
    """Their sum overflows; a second look clears them."""
    save_file({"t": torch.full((64,), 3e38)}, tmp_path / "model.safetensors")
    part = Part(HFReader(tmp_path), 0, 1, strict=True)
    mapping = Replicated("p", ("t",), (64,))
    list(part.blocks(Shard("k", (64,), (0,), (64,), mapping, ("t",), 0, 0, True), 0, 64))
    assert part.not_finite == set()
