"""Small safetensors files and folders, right and wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_llama import all_tensors

from prism_nemo.checkpoint.hf_writer import Planned, plan_files, write_file, write_index


def planned(tensors: Mapping[str, torch.Tensor]) -> list[Planned]:
    """Tensors in memory as the writer takes them."""
    return [Planned(name, t.dtype, tuple(t.shape), lambda t=t: iter([t])) for name, t in tensors.items()]  # type: ignore[misc]


def write_folder(tensors: Mapping[str, torch.Tensor], folder: Path, limit: int) -> Path:
    """A folder of safetensors files of at most `limit` bytes, with an index."""
    folder.mkdir()
    files = plan_files(planned(tensors), limit)
    for name, content in files.items():
        write_file(folder / name, content)
    write_index(folder, files)
    return folder


def sharded_copy(source: Path, folder: Path, limit: int = 60_000) -> Path:
    """A Hugging Face folder with its tensors in several files."""
    write_folder(all_tensors(source), folder, limit)
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path
