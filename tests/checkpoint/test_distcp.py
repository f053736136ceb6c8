"""Our checkpoint files are Megatron's: what we write others read, what they write we read, region by region."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import checkpoint_workers as workers
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import all_tensors

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.distcp import ChunkWriter, envelope, write_metadata
from prism_nemo.checkpoint.distcp_reader import CheckpointReader
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.runtime.launch import launch

TENSORS = {
    "stacked": torch.arange(2 * 6 * 5).reshape(2, 6, 5).float(),
    "plain": torch.arange(7 * 4).reshape(7, 4).bfloat16(),
    "vector": torch.arange(9).half(),
}


def write(folder: Path, tensors: dict[str, torch.Tensor], cuts: dict[str, list[tuple[slice, ...]]]) -> Path:
    """A checkpoint of two files; each tensor in the chunks that `cuts` names, or whole."""
    folder.mkdir()
    records = []
    for rank in range(2):
        with ChunkWriter(folder, rank) as writer:
            for i, (key, tensor) in enumerate(tensors.items()):
                regions = cuts.get(key) or [tuple(slice(0, n) for n in tensor.shape)]
                for j, region in enumerate(regions):
                    if (i + j) % 2 == rank:
                        part = tensor[region].contiguous()
                        offset = tuple(s.start for s in region)
                        writer.tensor(key, tensor.dtype, tuple(tensor.shape), offset, tuple(part.shape), part.split(1))
            if rank == 0:
                writer.object("extra/shard_0_1", None)
            writer.finish()
        records.append(writer.record)
    write_metadata(folder, records)
    return folder


CUTS: dict[str, list[tuple[slice, ...]]] = {
    "stacked": [(slice(i, i + 1), slice(0, 6), slice(j, k)) for i in range(2) for j, k in ((0, 2), (2, 5))],
    "plain": [(slice(0, 3), slice(0, 4)), (slice(3, 7), slice(0, 4))],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("distcp") / "checkpoint", TENSORS, CUTS)


@pytest.mark.filterwarnings("ignore")
def test_torch_reads_it(checkpoint: Path) -> None:
    target = {name: torch.full_like(tensor, -1.0) for name, tensor in TENSORS.items()}
    dcp.load(target, checkpoint_id=checkpoint, no_dist=True)
    assert all(torch.equal(target[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1, 4, 2), (2**14, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_envelope_is_an_archive_of_torch(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    head, tail = envelope(dtype, shape)
    (tmp_path / "x").write_bytes(head + tensor.view(-1).view(torch.uint8).numpy().tobytes() + tail)
    back = torch.load(tmp_path / "x", weights_only=True)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), key=st.sampled_from(sorted(TENSORS)))
def test_any_region(checkpoint: Path, data: st.DataObject, key: str) -> None:
    tensor = TENSORS[key]
    low = [data.draw(st.integers(0, n - 1)) for n in tensor.shape]
    high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, tensor.shape, strict=True)]
    region = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    out = torch.full(tensor[region].shape, 77.0, dtype=tensor.dtype)
    with CheckpointReader(checkpoint) as reader:
        reader.read(key, low, out)
        assert reader.dtype(key) == tensor.dtype
    assert torch.equal(out, tensor[region])


def test_missing_chunk_is_noticed_when_written(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="checkpoint tensor 'plain': 12 of 28 numbers were written"):
        write(tmp_path / "x", TENSORS, {"plain": CUTS["plain"][:1]})


def test_missing_chunk_is_noticed_when_read(checkpoint: Path, tmp_path: Path) -> None:
    copy = write(tmp_path / "x", TENSORS, CUTS)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.state_dict_metadata["plain"].chunks.pop()
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with CheckpointReader(copy) as reader, pytest.raises(InputError, match="lacks a part of 'plain'"):
        reader.read("plain", (0, 0), torch.empty(7, 4, dtype=torch.bfloat16))


def test_tensor_that_is_not_there(checkpoint: Path) -> None:
    with CheckpointReader(checkpoint) as reader, pytest.raises(InputError, match="holds no tensor 'nothing'"):
        reader.dtype("nothing")


def test_ranks_that_disagree_about_a_type(tmp_path: Path) -> None:
    records = []
    for rank, dtype in enumerate((torch.float32, torch.bfloat16)):
        with ChunkWriter(tmp_path, rank) as writer:
            writer.tensor("t", dtype, (2, 3), (rank, 0), (1, 3), [torch.ones(1, 3, dtype=dtype)])
        records.append(writer.record)
    with pytest.raises(InputError, match=r"'t' would be bfloat16 .* and float32 .* in another"):
        write_metadata(tmp_path, records)


@pytest.mark.parametrize("change", ["moved", "another shape", "cut"])
def test_damaged_chunk_is_noticed(tmp_path: Path, change: str) -> None:
    copy = write(tmp_path / "x", TENSORS, CUTS)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == "vector")
    place = metadata.storage_data[index]
    if change == "moved":
        place.offset += 7
    elif change == "another shape":
        metadata.state_dict_metadata["vector"].chunks[0].sizes = torch.Size([8])
    else:
        place.length -= 900
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with CheckpointReader(copy) as reader, pytest.raises(InputError, match=r"\.distcp: (damaged|the chunk) at"):
        reader.read("vector", (0,), torch.empty(8 if change == "another shape" else 9, dtype=torch.float16))


def test_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.metadata: cannot be read"):
        CheckpointReader(tmp_path)


def content(checkpoint: Path) -> dict[str, Any]:
    """Shapes, types and object names of a checkpoint, and every tensor's numbers."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    found: dict[str, Any] = {}
    with CheckpointReader(checkpoint) as reader:
        for key, value in metadata.state_dict_metadata.items():
            if not hasattr(value, "chunks"):
                found[key] = None
                continue
            numbers = torch.empty(value.size, dtype=value.properties.dtype)
            reader.read(key, (0,) * len(value.size), numbers)
            found[key] = numbers
            held = sorted((tuple(c.offsets), tuple(c.sizes)) for c in value.chunks)
            assert sum(math.prod(sizes) for _, sizes in held) == value.size.numel()
    return found


@pytest.mark.parametrize(
    "layout", [ParallelConfig(), ParallelConfig(2), ParallelConfig(1, 2)], ids=["one", "TP2", "PP2"]
)
def test_an_import_is_what_megatron_saves(tied_hf: Path, tmp_path: Path, layout: ParallelConfig) -> None:
    """Key for key and number for number, objects included, also the tied output layer of a last stage."""
    launch(workers.save_filled, str(tied_hf), str(tmp_path / "saved"), layout, processes=layout.world_size)
    import_hf(tied_hf, tmp_path / "imported", layout)
    saved, imported = content(tmp_path / "saved"), content(tmp_path / "imported")
    assert saved.keys() == imported.keys()
    for key, numbers in saved.items():
        assert (numbers is None) == (imported[key] is None)
        assert numbers is None or torch.equal(numbers, imported[key]), key
    rows = all_tensors(tied_hf)["model.embed_tokens.weight"]
    assert torch.equal(imported["embedding.word_embeddings.weight"][: len(rows)], rows)
