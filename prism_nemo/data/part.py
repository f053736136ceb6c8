"""The tokens of one unit on disk: ids, lengths, and what was left out. Written once, whole or not at all.

A part is what a build can be continued from, and what several machines hand to the one that joins them. Layout: ids
back to back, then the arrays (a row per document; `loss` has one per token), then a JSON footer, its length and a
closing word. A file without the closing word is not whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_END = struct.Struct("<Q8s")
_WORD = b"PRISMPRT"
_COPY_BYTES = 8 << 20
_ARRAYS = ("lengths", "lines", "characters", "digests", "signatures", "loss", "loss_tokens")


class PartWriter:
    """Writes a part under a temporary name; `finish` gives it its own."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path = path
        self._dtype = dtype
        self._temporary = path.with_name(f".tmp-{os.uname().nodename}-{os.getpid()}-{path.name}")
        self._stream = open(self._temporary, "wb")  # noqa: SIM115  (closed by finish or abandon)
        self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
        self._tokens = 0

    def add(self, ids: np.ndarray, **arrays: np.ndarray) -> None:
        """Appends documents: their ids back to back, and a row per document in each array (per token in `loss`)."""
        self._stream.write(ids.astype(self._dtype, copy=False).tobytes())
        self._tokens += len(ids)
        for name, values in arrays.items():
            self._arrays[name].append(values)

    def finish(self, report: dict[str, Any]) -> None:
        """Writes the rest, waits for the disk, and renames."""
        footer: dict[str, Any] = {"dtype": self._dtype.name, "tokens": self._tokens, "report": report, "arrays": {}}
        for name, pieces in self._arrays.items():
            if pieces:
                values = np.concatenate(pieces)
                footer["arrays"][name] = [values.dtype.str, list(values.shape), self._stream.tell()]
                self._stream.write(values.tobytes())
        text = json.dumps(footer).encode()
        self._stream.write(text + _END.pack(len(text), _WORD))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.rename(self._temporary, self.path)

    def abandon(self) -> None:
        """Removes what was written so far."""
        with contextlib.suppress(OSError):  # a full disk: what could not be flushed is removed anyway
            self._stream.close()
        self._temporary.unlink(missing_ok=True)


class Part:
    """A whole part, opened for reading.

    Attributes:
        tokens: Number of ids.
        report: As given to `finish`.
        documents: Number of documents.
    """

    def __init__(self, path: Path) -> None:
        """Opens a part.

        Raises:
            ValueError: It is not whole.
            FileNotFoundError: There is none.
        """
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as stream:
            if size < _END.size:
                raise ValueError("too short")
            stream.seek(size - _END.size)
            length, word = _END.unpack(stream.read())
            if word != _WORD or length > size:
                raise ValueError("no closing word")
            stream.seek(size - _END.size - length)
            footer = json.loads(stream.read(length))
        self._dtype = np.dtype(footer["dtype"])
        self._layout: dict[str, Any] = footer["arrays"]
        self.tokens: int = footer["tokens"]
        self.report: dict[str, Any] = footer["report"]
        lengths = self.array("lengths")
        self.documents = 0 if lengths is None else len(lengths)

    def array(self, name: str) -> np.ndarray | None:
        """Returns one of the arrays, or None if there is none."""
        if name not in self._layout:
            return None
        kind, shape, at = self._layout[name]
        with open(self.path, "rb") as stream:
            stream.seek(at)
            data = stream.read(int(np.prod(shape)) * np.dtype(kind).itemsize)
        return np.frombuffer(data, kind).reshape(shape)

    def copy(self, keep: np.ndarray, out: Any) -> None:
        """Writes the ids of the documents where `keep` is true, back to back."""
        self._copy(keep, out, 0, self._dtype.itemsize)

    def copy_loss(self, keep: np.ndarray, out: Any) -> None:
        """Writes a byte per id that `copy` writes: whether it is in the loss; ones where no mask was asked for."""
        if "loss" in self._layout:
            self._copy(keep, out, self._layout["loss"][2], 1)
            return
        lengths = self.array("lengths")
        left = 0 if lengths is None else int(lengths[keep].sum(dtype=np.int64))
        while left > 0:
            count = min(left, _COPY_BYTES)
            out.write(b"\1" * count)
            left -= count

    def _copy(self, keep: np.ndarray, out: Any, at: int, width: int) -> None:
        """Copies kept documents out of a stretch of the file that begins at `at` and has `width` bytes per token."""
        lengths = self.array("lengths")
        if lengths is None:
            return
        ends = np.cumsum(lengths, dtype=np.int64) * width
        with open(self.path, "rb") as stream:
            for first, last in _runs(keep):
                begin = int(ends[first - 1]) if first else 0
                left = int(ends[last]) - begin
                stream.seek(at + begin)
                while left > 0:
                    data = stream.read(min(left, _COPY_BYTES))
                    if not data:
                        raise OSError(errno.EIO, "ended while it was read", str(self.path))
                    out.write(data)
                    left -= len(data)


def _runs(keep: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last index of each stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    for first, end in edges.reshape(-1, 2):
        yield int(first), int(end) - 1
