"""Cutting inputs into units that several processes can share out, and naming what a unit holds.

A unit is a stretch of one input: a byte range of JSON lines, some row groups of a Parquet file, a few text files. How
an input is cut depends on its files alone, never on the number of processes, so the order of documents does not either.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.data.indexed import document_spans
from prism_nemo.data.mixture import Input, file_kind

UNIT_BYTES = 16 << 20
"""Bytes of a unit: seconds of tokenising, so that progress moves and little is lost when a build is killed."""

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Unit:
    """A stretch of one input.

    Attributes:
        kind: One of the values of `mixture.SUFFIXES`, or `hub`.
        files: One file; several for text; the dataset's id and commit for the Hub.
        start: First byte (JSON lines), row group (Parquet), document (tokens) or shard (Hub).
        end: One past the last.
        bytes: Of the files, for showing progress.
    """

    kind: str
    files: tuple[str, ...]
    start: int
    end: int
    bytes: int


def units_of(item: Input) -> Iterator[Unit]:
    """Cuts an input into units; needs no more than sizes and file indices, and opens a file when its turn comes.

    Raises:
        InputError: A Parquet file or token index that cannot be opened, or a Hub that cannot be reached.
    """
    if item.hub is not None:
        from prism_nemo.data.hub import hub_units

        yield from hub_units(item.hub)
        return
    for kind, names in itertools.groupby(item.paths, key=file_kind):
        if kind == "text":
            yield from _text_units(list(names))
            continue
        for name in names:
            size = Path(name).stat().st_size
            if kind == "jsonl":
                for at in range(0, size, UNIT_BYTES):
                    yield Unit(kind, (name,), at, min(at + UNIT_BYTES, size), min(UNIT_BYTES, size - at))
            elif kind == "parquet":
                from prism_nemo.data.parquet import parquet_units

                yield from parquet_units(name, UNIT_BYTES)
            elif kind == "tokens":
                yield from _token_units(name)
            else:
                yield Unit(str(kind), (name,), 0, size, size)


def unit_digest(unit: Unit) -> str:
    """Returns a hash of the bytes that a unit reads; for the Hub, of the commit that it reads."""
    digest = hashlib.sha256(unit.kind.encode())
    name = unit.files[0]
    if unit.kind == "jsonl":
        _hash_range(digest, name, *aligned(unit))
    elif unit.kind == "text":
        for file in unit.files:
            digest.update(file_sha256(file).encode())
    elif unit.kind == "parquet":
        from prism_nemo.data.parquet import unit_range

        _hash_range(digest, name, *unit_range(unit))
    elif unit.kind == "tokens":
        dtype, spans = document_spans(name)
        mine = spans[unit.start : unit.end]
        digest.update(dtype.str.encode() + (mine - mine[0, 0]).tobytes())
        _hash_range(digest, name, int(mine[0, 0]), int(mine[-1, 1]))
    elif unit.kind == "hub":
        digest.update(json.dumps([unit.files, unit.start, unit.end]).encode())
    else:
        digest.update(file_sha256(name).encode())
    return digest.hexdigest()


def lines_before(unit: Unit) -> int:
    """Returns how many lines, rows or documents of its file lie before a unit; reads the file up to there."""
    if unit.kind == "jsonl":
        return _count_lines(unit.files[0], aligned(unit)[0])
    if unit.kind == "parquet":
        from prism_nemo.data.parquet import rows_before

        return rows_before(unit)
    return unit.start if unit.kind == "tokens" else 0


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)
def aligned(unit: Unit) -> tuple[int, int]:
    """Returns the byte range of the lines that start inside a unit of JSON lines."""
    with open(unit.files[0], "rb") as stream:

        def line_start(offset: int) -> int:
            if offset == 0:
                return 0
            stream.seek(offset - 1)
            # In pieces: a line may be longer than memory.
            while piece := stream.readline(_COPY_BYTES):
                if piece.endswith(b"\n"):
                    break
            return stream.tell()

        return line_start(unit.start), line_start(unit.end)


@functools.lru_cache(maxsize=64)
def _count_lines(name: str, end: int) -> int:
    count = 0
    with open(name, "rb") as stream:
        while end > 0 and (data := stream.read(min(end, _COPY_BYTES))):
            count += data.count(b"\n")
            end -= len(data)
    return count


def _hash_range(digest: Any, name: str, start: int, end: int) -> None:
    with open(name, "rb") as stream:
        stream.seek(start)
        left = end - start
        while left > 0 and (data := stream.read(min(left, _COPY_BYTES))):
            digest.update(data)
            left -= len(data)


def _text_units(names: list[str]) -> list[Unit]:
    units: list[Unit] = []
    group: list[str] = []
    size = 0
    for i, name in enumerate(names):
        group.append(name)
        size += Path(name).stat().st_size
        if size >= UNIT_BYTES or i == len(names) - 1:
            units.append(Unit("text", tuple(group), 0, len(group), size))
            group, size = [], 0
    return units


def _token_units(name: str) -> list[Unit]:
    _, spans = document_spans(name)
    units: list[Unit] = []
    first = 0
    for i, (_, end) in enumerate(spans):
        if end - spans[first][0] >= UNIT_BYTES or i == len(spans) - 1:
            units.append(Unit("tokens", (name,), first, i + 1, int(end - spans[first][0])))
            first = i + 1
    return units
