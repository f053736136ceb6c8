"""One safetensors file: its header checked before anything is believed, rows and columns read into given memory.

The library of the same name maps whole tensors; here a rank reads the rows and columns that it keeps, a block at a
time, so that memory does not grow with the model.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism_nemo.errors import InputError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes of an element of every type of the format, so that also a tensor that nobody reads must lie in the file.
_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
# The format's own limit; a longer header is an attack or a damaged length.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        dtype: Name of its type in the format.
        shape: Its shape.
        start: First byte in the file.
        end: First byte after it.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def as_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a contiguous CPU tensor as bytes, flat; numpy has no bf16."""
    return tensor.view(-1).view(torch.uint8).numpy()


def read_exactly(descriptor: int, into: np.ndarray[Any, Any], position: int, path: Path) -> None:
    """Fill `into` (flat bytes) from `position`.

    Raises:
        InputError: If the file ends before that, or cannot be read.
    """
    view, done = memoryview(into), 0  # type: ignore[arg-type]
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], position + done)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if not count:
            raise InputError(f"{path}: shorter than its header says (ends before byte {position + len(view)})")
        done += count


def open_file(path: Path) -> int:
    """A descriptor for reading.

    Raises:
        InputError: For a file that is not there, a loop of symbolic links, a folder, or one that may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
    if not os.path.isfile(path):
        os.close(descriptor)
        raise InputError(f"{path}: is not a file")
    return descriptor


class SafetensorsFile:
    """An open file.

    Args:
        path: The file.

    Attributes:
        entries: By name of the tensor, in the order of the file.

    Raises:
        InputError: If the header and the file contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._descriptor = open_file(path)
        try:
            self.entries = self._read_header()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _bad(self, what: str) -> InputError:
        return InputError(f"{self.path}: truncated or not a safetensors file ({what}); download it again")

    def _read_header(self) -> dict[str, Entry]:
        size = os.fstat(self._descriptor).st_size
        length = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))[0] if size >= 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise self._bad(f"a header of {length} bytes in a file of {size}")
        raw = np.empty(length, dtype=np.uint8)
        read_exactly(self._descriptor, raw, 8, self.path)
        try:
            header = json.loads(raw.tobytes(), object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        position, previous = 8 + length, "the header"
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != position:
                what = "overlaps" if entry.start < position else "leaves a hole after"
                raise self._bad(f"tensor '{name}' {what} {previous}")
            position, previous = entry.end, f"'{name}'"
        if position != size:
            raise self._bad(f"its tensors end at byte {position}, the file at {size}")
        return entries

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in values if names.count(name) > 1)
            raise self._bad(f"its header names '{twice}' twice")
        return values

    def _entry(self, name: str, value: Any, data: int) -> Entry:
        try:
            dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            numbers = (start, end, *shape)
            right = dtype in _SIZES and all(type(n) is int and n >= 0 for n in numbers)
            right = right and end - start == math.prod(shape) * _SIZES[dtype]
        except (KeyError, TypeError, ValueError):
            right = False
        if not right:
            raise self._bad(f"the header's entry of tensor '{name}' contradicts itself: {str(value)[:200]}")
        return Entry(dtype, shape, data + start, data + end)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor.

        Raises:
            InputError: For one that is no kind of weight that a model is trained in.
        """
        known = self.entries[name].dtype
        if known not in DTYPES:
            raise InputError(
                f"{self.path}: tensor '{name}' is of type {known}; supported: {', '.join(DTYPES)}. A quantised model "
                "must be dequantised first"
            )
        return DTYPES[known]

    def read(self, name: str, first: int, out: torch.Tensor, columns: tuple[int, int] | None = None) -> None:
        """Read rows into memory.

        Args:
            name: Of the tensor, [n, ...].
            first: First row.
            out: [rows, ...], contiguous, of the tensor's type.
            columns: First and last-plus-one index of the second dimension; all if not given.
        """
        if not out.numel():
            return
        entry, rows = self.entries[name], len(out)
        row_bytes = (entry.end - entry.start) // entry.shape[0]
        start = entry.start + first * row_bytes
        into = as_bytes(out)
        if columns is None or columns == (0, entry.shape[1]):
            read_exactly(self._descriptor, into, start, self.path)
            return
        column_bytes = row_bytes // entry.shape[1]
        with window(self._descriptor, start, rows * row_bytes) as mapped:
            part = mapped.array.reshape(rows, row_bytes)[:, columns[0] * column_bytes : columns[1] * column_bytes]
            np.copyto(into.reshape(rows, -1), part)
            del part


class window:
    """A stretch of a file in memory while the block is open: only the pages that are touched are read.

    Args:
        descriptor: Of the file, which must be long enough.
        start: First byte.
        size: Bytes.

    Attributes:
        array: The bytes, flat; no view of it may outlive the block.
    """

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        slack = start % mmap.ALLOCATIONGRANULARITY
        self._map = mmap.mmap(descriptor, size + slack, prot=mmap.PROT_READ, offset=start - slack)
        self.array: Any = np.frombuffer(self._map, dtype=np.uint8, count=size, offset=slack)

    def __enter__(self) -> window:
        return self

    def __exit__(self, *_: object) -> None:
        self.array = None
        self._map.close()
