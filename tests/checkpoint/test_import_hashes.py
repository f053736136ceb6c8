"""Imported checkpoints have the SHA-256 of every file, made while writing, and a damaged one is not trained from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny_models import save_tiny

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.hashes import damage
from prism_nemo.config import ParallelConfig


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(2)], ids=["1", "tp2"])
def test_every_file_has_its_hash(parallel: ParallelConfig, tmp_path: Path) -> None:
    """Beside hashlib's over the files as they lie on the disk; several ranks write a file each."""
    hf = save_tiny("granite-hybrid-one-group", tmp_path / "hf")
    (hf / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    import_hf(hf, out, parallel)
    manifest = json.loads((out / "manifest.json").read_text())
    files = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert manifest["sha256"] == {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    assert manifest["sha256"].keys() == manifest["files"].keys()
    assert "hf/tokenizer_config.json" in files
    assert len([name for name in files if name.endswith(".distcp")]) == parallel.world_size


def test_a_flipped_bit_of_an_import_is_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_hf(save_tiny("llama", tmp_path / "hf"), out, ParallelConfig())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert damage(out) is None
        file = out / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert "__0_0.distcp: its SHA-256 is not the one in manifest.json" in str(damage(out))
    finally:
        dist.destroy_process_group()
