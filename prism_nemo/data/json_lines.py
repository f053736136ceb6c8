"""Reading JSON lines, plain and compressed, of bounded length; a line that cannot be read is a `Problem`."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

import zstandard

from prism_nemo.data.problem import Problem, too_long
from prism_nemo.data.units import Unit, aligned
from prism_nemo.errors import InputError

BLANK: dict[str, Any] = {}
"""Stands for a line without a sign on it; told apart by identity."""

_COPY_BYTES = 1 << 20


def read_lines(unit: Unit, limit: int) -> Iterator[tuple[int, Any]]:
    """Yields what the lines of a unit hold, numbered from 1: values of JSON, `BLANK`, or problems.

    Args:
        unit: Of JSON lines, or a compressed file of them.
        limit: Bytes; a longer line is a problem and never held in memory.

    Raises:
        InputError: A compressed stream is damaged; the message says after which line.
    """
    number = 0
    try:
        with _open_lines(unit) as stream:
            end = aligned(unit)[1] if unit.kind == "jsonl" else None
            for number, (line, size) in enumerate(_lines(stream, end, limit), start=1):
                yield number, too_long(size, limit) if size > limit else _record(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as err:
        kind = "zstd" if unit.kind.endswith("zst") else "gzip"
        raise InputError(
            f"{unit.files[0]}: the {kind} stream is damaged after line {number} ({err}); copy it again."
        ) from err


def _lines(stream: IO[bytes], end: int | None, limit: int) -> Iterator[tuple[bytes, int]]:
    """Yields each line with its size; of a line above the limit only the start, so that memory stays bounded.

    Lines are split at b"\\n" alone: str.splitlines would also split at U+2028, which JSON allows inside a string.
    """
    position = 0 if end is None else stream.tell()
    while end is None or position < end:
        line = stream.readline(limit + 2)
        if not line:
            return
        size = len(line)
        if size > limit and not line.endswith(b"\n"):
            while more := stream.readline(_COPY_BYTES):
                size += len(more)
                if more.endswith(b"\n"):
                    break
        position += size
        yield line, size


def _record(line: bytes) -> Any:
    if not line.strip():
        return BLANK
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as err:
        return Problem("not UTF-8", f"is not UTF-8 text ({err}).")
    except json.JSONDecodeError as err:
        return Problem("not JSON", f"is not JSON: {err}. Every line must be one object.")
    except RecursionError:
        return Problem("not JSON", "is nested too deeply to be read.")


def _open_lines(unit: Unit) -> IO[bytes]:
    name = unit.files[0]
    if unit.kind == "jsonl.gz":
        return gzip.open(name, "rb")  # type: ignore[return-value]
    if unit.kind == "jsonl.zst":
        return io.BufferedReader(_ZstdStream(name), _COPY_BYTES)
    stream = open(name, "rb", buffering=_COPY_BYTES)  # noqa: SIM115
    stream.seek(aligned(unit)[0])
    return stream


class _ZstdStream(io.RawIOBase):
    """A zstd file as a stream of bytes. zstandard's own reader takes a file cut short for one that ends there."""

    def __init__(self, name: str) -> None:
        self._file = open(name, "rb")  # noqa: SIM115
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._file.read(_COPY_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            while data:
                if self._frame is None:
                    self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._ready += self._frame.decompress(data)
                data = b""
                if self._frame.eof:
                    data, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
