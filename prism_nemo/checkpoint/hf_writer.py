"""Writing a Hugging Face folder: safetensors shards front to back, the index last."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prism_nemo.checkpoint.files import WriteFile, read_ahead
from prism_nemo.checkpoint.hf import INDEX, SINGLE
from prism_nemo.checkpoint.safetensors_file import NAMES, as_bytes

DEFAULT_SHARD_BYTES = 5 * 10**9  # "5GB", as transformers and the hub count


@dataclass(frozen=True)
class Planned:
    """A tensor to write.

    Attributes:
        name: Of the tensor.
        dtype: Its type.
        shape: Its shape.
        blocks: Gives its numbers in order, contiguous, once the writer gets there.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_files(tensors: Iterable[Planned], max_shard_bytes: int) -> dict[str, list[Planned]]:
    """Which file holds which tensors; a new file is begun before the limit would be passed."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def write_file(path: Path, tensors: list[Planned]) -> None:
    """One safetensors file, brought to disk.

    Wider types come first, as in files that the safetensors library writes: readers that map the file need numbers at
    multiples of their size.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = WriteFile(path)
    try:
        file.write(struct.pack("<Q", len(text)) + text)
        for block in read_ahead(block for tensor in ordered for block in tensor.blocks()):
            file.write(as_bytes(block))
        if file.position != 8 + len(text) + end:
            raise RuntimeError(f"{path}: {file.position} bytes were written, {8 + len(text) + end} were planned")
        file.sync()
    finally:
        file.close()


def write_index(folder: Path, files: dict[str, list[Planned]]) -> None:
    """The index, if there is more than one file."""
    if set(files) == {SINGLE}:
        return
    where = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    total = sum(tensor.bytes for tensors in files.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
