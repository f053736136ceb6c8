"""From a checkpoint's tensors back to Hugging Face rows, however the rows of a parameter are cut."""

from __future__ import annotations

import functools
from pathlib import Path

import checkpoint_workers as workers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import every_kind
from tiny_llama import all_tensors

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.placement import Shard, segments
from prism_nemo.config import ParallelConfig
from prism_nemo.runtime.launch import launch


@settings(deadline=None, max_examples=40)
@given(data=st.data(), sizes=st.tuples(*[st.integers(1, 3)] * 3), stacked=st.integers(0, 1))
def test_every_row_is_found_where_it_was_put(data: st.DataObject, sizes: tuple[int, int, int], stacked: int) -> None:
    """Every kind of mapping, its rows cut anywhere and each piece at a place of its own."""
    for mapping in every_kind(*sizes, size=1):
        generator = torch.Generator().manual_seed(0)
        tensors = tuple(torch.randn(shape, generator=generator) for shape in mapping.hf_shapes())
        full = mapping.to_megatron(tensors)
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(full) - 1)), max_size=3)))
        ends = [cut for cut in cuts if cut < len(full)] + [len(full)]
        shards, stored, first = [], {}, 0
        for i, end in enumerate(ends):
            shape = (end - first, *full.shape[1:])
            key, offset = f"k{i}", (4,) * stacked + (10 * i,) + (0,) * (full.dim() - 1)
            shards.append(Shard(key, shape, offset, shape, mapping, mapping.hf, first, stacked, True))
            stored[key] = (offset, full[first:end])
            first = end
        found = segments(shards)
        known = {run.source for run in mapping.runs(0, 1)} - {None}
        for source in known:
            shape, parts = found[mapping.hf[source]]
            assert shape == tensors[source].shape
            start = min(run.start for run in mapping.runs(0, 1) if run.source == source)
            rows = []
            for part in parts:
                offset, held = stored[part.key]
                assert part.offset[:stacked] == offset[:stacked]
                begin = part.offset[stacked] - offset[stacked]
                rows.append(held[begin : begin + part.rows])
            assert torch.equal(torch.cat(rows), tensors[source][start:])
            assert [part.row for part in parts] == _starts(start, [part.rows for part in parts])


def _starts(first: int, lengths: list[int]) -> list[int]:
    return functools.reduce(lambda found, n: [*found, found[-1] + n], lengths[:-1], [first])


def test_export_in_many_blocks(tiny_hf: Path, tmp_path: Path) -> None:
    """2 MB in earnest; here so small that every matrix is read in several pieces."""
    import_hf(tiny_hf, tmp_path / "checkpoint", ParallelConfig(2))
    launch(workers.export_in_blocks, str(tmp_path / "checkpoint"), str(tmp_path / "out"), 500)
    before, after = all_tensors(tiny_hf), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
