"""A save takes no memory of the device, and writes what it would write with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lean_save_workers import save_twice
from test_parity import _masked_rows
from tiny_models import save_tiny

from prism_nemo.checkpoint.atomic import HASHES, MANIFEST
from prism_nemo.config import ParallelConfig
from prism_nemo.runtime.launch import launch


# Tied embeddings: on two pipeline stages the buffers have padding between two buckets.
@pytest.mark.parametrize("layout", [ParallelConfig(data_parallel_size=2), ParallelConfig(1, 2, 2)], ids=["dp2", "pp2"])
def test_the_optimizer_is_gathered_in_host_memory_of_one_rank(layout: ParallelConfig, tmp_path: Path) -> None:
    hf = str(save_tiny("granite-4", tmp_path / "hf"))
    launch(save_twice, hf, str(tmp_path), layout, _masked_rows(1, 149)[0], processes=layout.world_size)
    got = []
    for rank in range(layout.world_size):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["warnings"] == []
        (asked,) = seen["asked"]
        assert (asked["gloo"], asked["everywhere"]) == (True, False)
        got.append(asked["got"])
    assert got == [True, False] * layout.pipeline_model_parallel_size
    own, other = (json.loads((tmp_path / name / MANIFEST).read_text())[HASHES] for name in ("own", "all"))
    for hashes in (own, other):
        del hashes[".metadata"]  # has the folder's name in it
    assert len(own) > 3
    assert own == other
