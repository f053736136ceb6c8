"""Megatron's distributed checkpoint files, written and read a piece at a time.

torch.distributed.checkpoint keeps every chunk of a tensor as a `torch.save` archive of its own inside a large file, and
one ``.metadata`` that says which chunk lies where. Its writer takes whole tensors and its reader whole chunks; here the
numbers go through a small buffer. What is written is the same: Megatron and torch read it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from prism_nemo.checkpoint.files import WriteFile
from prism_nemo.checkpoint.safetensors_file import as_bytes
from prism_nemo.errors import InputError, PrismError

# Larger tensors are several chunks: whoever loads the checkpoint has one chunk in memory beside the model.
CHUNK_BYTES = 64 * 2**20


class _Envelope(io.RawIOBase):
    """Receives a `torch.save` that leaves its numbers out: the bytes before and after them."""

    def __init__(self) -> None:
        self.head, self.tail, self.hole = bytearray(), bytearray(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        (self.tail if self.hole else self.head).extend(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR or self.hole:
            raise PrismError("torch.save writes its archives in another way than this version of prism-nemo knows")
        self.hole = offset
        return self.tell()

    def tell(self) -> int:
        return len(self.head) + self.hole + len(self.tail)


@functools.lru_cache(maxsize=256)
def envelope(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the numbers of a tensor. The checksum is left out, as torch allows."""
    sink = _Envelope()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), sink)  # type: ignore[arg-type]
    if sink.hole != torch.Size(shape).numel() * dtype.itemsize:
        raise PrismError("torch.save writes its archives in another way than this version of prism-nemo knows")
    return bytes(sink.head), bytes(sink.tail)


@dataclass
class Record:
    """What one rank wrote; rank 0 makes ``.metadata`` of all of them.

    Attributes:
        tensors: Type and shape by key.
        chunks: Key, offset, sizes and place of every chunk.
        objects: Key and place of what is no tensor.
        hashes: SHA-256 of the file by its name, once it is finished.
    """

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], Any]] = field(default_factory=list)
    objects: list[tuple[str, Any]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)


class ChunkWriter:
    """Writes one ``.distcp`` file, and hashes it on the way: what is in memory is what should be on the disk.

    Args:
        folder: Of the checkpoint.
        rank: Of this process; names the file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.name = f"__{rank}_0.distcp"
        self.record = Record()
        self._file = WriteFile(folder / self.name)
        # Neither hashing nor writing needs the interpreter: each piece is hashed by a thread while it is written.
        self._hash, self._hasher = hashlib.sha256(), ThreadPoolExecutor(1)

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._file.close()

    def _write(self, data: Any) -> None:
        hashed = self._hasher.submit(self._hash.update, data)
        self._file.write(data)
        hashed.result()

    def tensor(
        self,
        key: str,
        dtype: torch.dtype,
        global_shape: tuple[int, ...],
        offset: tuple[int, ...],
        sizes: tuple[int, ...],
        blocks: Iterable[torch.Tensor],
    ) -> None:
        """Write one chunk.

        Args:
            key: Of the tensor.
            dtype: Its type.
            global_shape: Its shape.
            offset: Of the chunk.
            sizes: Of the chunk, as many as there are dimensions.
            blocks: Its numbers in order, contiguous.
        """
        head, tail = envelope(dtype, sizes)
        start = self._file.position
        self._write(head)
        for block in blocks:
            self._write(as_bytes(block))
        self._write(tail)
        self.record.tensors[key] = (dtype, global_shape)
        self.record.chunks.append((key, offset, sizes, _StorageInfo(self.name, start, self._file.position - start)))

    def object(self, key: str, value: Any) -> None:
        """Write something that is no tensor, as Megatron does."""
        buffer = io.BytesIO()
        torch.save([value], buffer)
        start = self._file.position
        self._write(buffer.getvalue())
        self.record.objects.append((key, _StorageInfo(self.name, start, len(buffer.getbuffer()))))

    def finish(self) -> None:
        """Bring the file to disk."""
        self._file.sync()
        self.record.hashes[self.name] = self._hash.hexdigest()


def write_metadata(folder: Path, records: Sequence[Record]) -> None:
    """``.metadata``, and the two files by which Megatron knows its format; rank 0, after every rank's `finish`.

    Raises:
        InputError: If ranks disagree about a tensor.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    content: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, Any] = {}
    for record in records:
        for key, (dtype, shape) in record.tensors.items():
            known = tensors.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks=[])
            )
            if known.properties.dtype != dtype or tuple(known.size) != shape:
                raise InputError(
                    f"checkpoint tensor '{key}' would be {str(dtype)[6:]} {shape} in one layer and "
                    f"{str(known.properties.dtype)[6:]} {tuple(known.size)} in another; a tensor has one type"
                )
        for key, offset, sizes, place in record.chunks:
            tensors[key].chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)))
            storage[MetadataIndex(key, offset)] = place
        for key, place in record.objects:
            content[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = place
    for key, tensor in tensors.items():
        held = sum(chunk.sizes.numel() for chunk in tensor.chunks)
        if held != tensor.size.numel():
            raise PrismError(f"checkpoint tensor '{key}': {held} of {tensor.size.numel()} numbers were written")
    content.update(tensors)
    metadata = Metadata(content, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({}, folder / "common.pt")
    kind = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{name}_version": 1 for name in kind}
    (folder / "metadata.json").write_text(json.dumps({**kind, **versions}))
