"""Regions of the tensors of a distributed checkpoint, read without reading whole chunks.

See `prism_nemo.checkpoint.distcp` for the format.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from prism_nemo.checkpoint.metadata_file import read_metadata
from prism_nemo.checkpoint.safetensors_file import as_bytes, open_file, read_exactly, window
from prism_nemo.errors import InputError


@dataclass(frozen=True)
class _Chunk:
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class CheckpointReader:
    """Reads regions of a checkpoint's tensors.

    Args:
        folder: A published checkpoint, saved at any layout by this project or by Megatron's torch_dist strategy.

    Raises:
        InputError: If it has no readable ``.metadata``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = read_metadata(folder)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if hasattr(v, "chunks")}
        storage = metadata.storage_data
        self._chunks: dict[str, list[_Chunk]] = {}
        for key, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                place = storage[MetadataIndex(key, chunk.offsets)]
                self._chunks.setdefault(key, []).append(
                    _Chunk(tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length)
                )
        self._descriptors: dict[str, int] = {}
        self._data: dict[_Chunk, int] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor.

        Raises:
            InputError: If the checkpoint does not hold it.
        """
        if key not in self._tensors:
            raise InputError(f"{self.folder}: holds no tensor '{key}'; it is not a checkpoint of this architecture")
        found: torch.dtype = self._tensors[key].properties.dtype
        return found

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = open_file(self.folder / file)
        return self._descriptors[file]

    def _data_start(self, chunk: _Chunk, dtype: torch.dtype) -> int:
        """Position of a chunk's first number in its file."""
        if chunk not in self._data:
            descriptor = self._descriptor(chunk.file)
            archive: Any = _Slice(descriptor, chunk.start, chunk.length)
            try:
                records: Any = torch._C.PyTorchFileReader(archive)
                start = records.get_record_offset("data/0")
                archive.seek(0)
                with torch.serialization.skip_data():
                    tensor = torch.load(archive, weights_only=True)
                right = tuple(tensor.shape) == chunk.sizes and tensor.dtype == dtype and tensor.is_contiguous()
                right = right and tensor.storage_offset() == 0
                right = right and start + tensor.numel() * dtype.itemsize <= chunk.length
            except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
                raise InputError(f"{self.folder / chunk.file}: damaged at byte {chunk.start}: {error}") from error
            if not right:
                raise InputError(f"{self.folder / chunk.file}: the chunk at {chunk.start} is not what .metadata says")
            self._data[chunk] = chunk.start + start
        return self._data[chunk]

    def read(self, key: str, offset: Sequence[int], out: torch.Tensor) -> None:
        """Read a region.

        Args:
            key: Of the tensor.
            offset: Of the region's first element.
            out: The region, contiguous, with as many dimensions as the tensor, of its type.

        Raises:
            InputError: If the checkpoint lacks a part of it.
        """
        dtype, wanted = self.dtype(key), tuple(out.shape)
        target, found = as_bytes(out).reshape(*wanted, dtype.itemsize), 0
        for chunk in self._chunks[key]:
            low = [max(a, b) for a, b in zip(offset, chunk.offset, strict=True)]
            ends = zip(offset, wanted, chunk.offset, chunk.sizes, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offset, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            self._copy(chunk, dtype, inside, target[here])
            found += int(np.prod([b - a for a, b in zip(low, high, strict=True)]))
        if found != out.numel():
            raise InputError(f"{self.folder}: lacks a part of '{key}'; the checkpoint is damaged")

    def _copy(self, chunk: _Chunk, dtype: torch.dtype, inside: tuple[slice, ...], into: np.ndarray[Any, Any]) -> None:
        start, path = self._data_start(chunk, dtype), self.folder / chunk.file
        lengths = [s.stop - s.start for s in inside]
        cut = next((i for i, n in enumerate(lengths) if n > 1), len(lengths))
        whole = all(n == m for n, m in zip(lengths[cut + 1 :], chunk.sizes[cut + 1 :], strict=True))
        if whole and into.flags.c_contiguous:
            strides = [int(np.prod(chunk.sizes[i + 1 :])) for i in range(len(chunk.sizes))]
            first = sum(s.start * stride for s, stride in zip(inside, strides, strict=True))
            read_exactly(self._descriptor(chunk.file), into.reshape(-1), start + first * dtype.itemsize, path)
            return
        size = int(np.prod(chunk.sizes)) * dtype.itemsize
        with window(self._descriptor(chunk.file), start, size) as mapped:
            np.copyto(into, mapped.array.reshape(*chunk.sizes, dtype.itemsize)[inside])


class _Slice(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        data = os.pread(self._descriptor, min(len(into), max(0, self._length - self._at)), self._start + self._at)
        into[: len(data)] = data
        self._at += len(data)
        return len(data)
