"""Reading documents out of files, in units that several processes can share out.

A unit is a stretch of one input: a byte range of JSON lines, some row groups of a Parquet file, a few text files. How
an input is cut depends on its files alone, never on the number of processes, so the order of documents does not either.

A document that cannot be read is handed on as a `Problem`, with its file and line; the build counts it or refuses the
source. A file that is damaged as a whole (a compressed stream cut short, a Parquet column of the wrong type) is an
error.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

from prism_nemo.data.expression import Expression, FieldError
from prism_nemo.data.indexed import document_spans
from prism_nemo.data.mixture import Input, file_kind
from prism_nemo.data.template import Render, render_field, render_template, render_turns
from prism_nemo.errors import InputError

UNIT_BYTES = 16 << 20
"""Bytes of a unit: seconds of tokenising, so that progress moves and little is lost when a build is killed."""

BLANK: dict[str, Any] = {}
"""Stands for a line without a sign on it; told apart by identity."""

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


@dataclass(frozen=True)
class Problem:
    """Why a document cannot be read.

    Attributes:
        kind: A few words, the same for all documents of the kind; counted.
        message: The whole story, without file and line.
    """

    kind: str
    message: str


@dataclass(slots=True)
class Document:
    """One document, or why there is none.

    Attributes:
        file: Where it was read.
        line: Its line or row from 1, counted from the start of the unit (see `lines_before`); 0 for a whole file.
        text: Its text; None if it is stored as tokens, or not there.
        ids: Its tokens, if it is stored as tokens.
        dropped: The filter that it failed.
        problem: Why it cannot be read.
    """

    file: str
    line: int
    text: str | None = None
    ids: np.ndarray | None = None
    dropped: str | None = None
    problem: Problem | None = None


def place(file: str, line: int) -> str:
    """Returns `file:line`, or the file alone where the document is the file."""
    return f"{file}:{line}" if line else file


def units_of(item: Input) -> list[Unit]:
    """Cuts an input into units; needs no more than sizes and file indices.

    Raises:
        InputError: A Parquet file or token index that cannot be opened, or a Hub that cannot be reached.
    """
    if item.hub is not None:
        from prism_nemo.data.hub import hub_units

        return hub_units(item.hub)
    units: list[Unit] = []
    for kind, names in itertools.groupby(item.paths, key=file_kind):
        if kind == "text":
            units += _text_units(list(names))
            continue
        for name in names:
            size = Path(name).stat().st_size
            if kind == "jsonl":
                units += [
                    Unit(kind, (name,), at, min(at + UNIT_BYTES, size), min(UNIT_BYTES, size - at))
                    for at in range(0, size, UNIT_BYTES)
                ]
            elif kind == "parquet":
                from prism_nemo.data.parquet import parquet_units

                units += parquet_units(name, UNIT_BYTES)
            elif kind == "tokens":
                units += _token_units(name)
            else:
                units.append(Unit(str(kind), (name,), 0, size, size))
    return units


def unit_digest(unit: Unit) -> str:
    """Returns a hash of the bytes that a unit reads; for the Hub, of the commit that it reads."""
    digest = hashlib.sha256(unit.kind.encode())
    name = unit.files[0]
    if unit.kind == "jsonl":
        _hash_range(digest, name, *_aligned(unit))
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


def read_unit(unit: Unit, item: Input, max_bytes: int) -> Iterator[Document]:
    """Yields what a unit holds, in order: documents, documents that a filter drops, and problems.

    Args:
        unit: From `units_of(item)`.
        item: The input that it belongs to.
        max_bytes: A longer line or text is a problem; it is never held in memory.

    Raises:
        InputError: The file is damaged as a whole; the message says after which line.
    """
    if unit.kind == "text":
        yield from _read_texts(unit, max_bytes)
        return
    if unit.kind == "tokens":
        yield from _read_tokens(unit)
        return
    render, filters = renderer(item), [Expression(text) for text in item.filter]
    if unit.kind == "parquet":
        from prism_nemo.data.parquet import read_rows

        records = read_rows(unit, _columns(item, filters))
    elif unit.kind == "hub":
        from prism_nemo.data.hub import read_hub

        records = read_hub(unit)
    else:
        records = _read_lines(unit, max_bytes)
    name = unit.files[0]
    for line, record in records:
        if record is BLANK:
            yield Document(name, line, "")
            continue
        yield _document(name, line, record, render, filters, max_bytes)


def renderer(item: Input) -> Render:
    """Returns the function that turns a record of an input into text."""
    if item.template is not None:
        return render_template(item.template)[0]
    return render_turns(item.turns, item.speakers) if item.turns is not None else render_field(item.text_field)


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def evaluation_records(paths: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields the records of files, or the texts of text files, each with its `file:line`.

    Raises:
        InputError: Anything in them cannot be read.
    """
    for name in paths:
        for unit in units_of(Input([name])):
            if unit.kind == "text":
                records: Any = [(0, doc.problem or doc.text) for doc in _read_texts(unit, sys.maxsize)]
            elif unit.kind == "parquet":
                from prism_nemo.data.parquet import read_rows

                records = read_rows(unit, {})
            else:
                records = _read_lines(unit, 1 << 30)
            for line, record in records:
                where = place(name, line + lines_before(unit) if line else 0)
                if isinstance(record, Problem):
                    raise InputError(f"{where}: {record.message}")
                yield where, record


def lines_before(unit: Unit) -> int:
    """Returns how many lines, rows or documents of its file lie before a unit; reads the file up to there."""
    if unit.kind == "jsonl":
        return _count_lines(unit.files[0], _aligned(unit)[0])
    if unit.kind == "parquet":
        from prism_nemo.data.parquet import rows_before

        return rows_before(unit)
    return unit.start if unit.kind == "tokens" else 0


def _document(file: str, line: int, record: Any, render: Render, filters: list[Expression], limit: int) -> Document:
    if isinstance(record, Problem):
        return Document(file, line, problem=record)
    if not isinstance(record, dict):
        problem = Problem("not an object", f"must be an object with fields, found {type(record).__name__}.")
        return Document(file, line, problem=problem)
    try:
        for expression in filters:
            if not expression(record):
                return Document(file, line, dropped=expression.text)
        text = render(record)
    except FieldError as err:
        advice = " Set `text_field`, `template` or `turns` of the source." if "has no field" in str(err) else ""
        return Document(file, line, problem=Problem("missing or wrong field", f"{err}.{advice}"))
    return _checked(file, line, text, limit)


def _checked(file: str, line: int, text: str, limit: int) -> Document:
    if "\0" in text:
        problem = Problem("NUL byte", f"holds a NUL byte at character {text.index(chr(0))}; it is probably not text.")
        return Document(file, line, problem=problem)
    try:
        # JSON can write half a surrogate pair, which the tokenizer rejects without saying where.
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as err:
        problem = Problem("half a surrogate pair", f"holds half a surrogate pair ({err}); repair it.")
        return Document(file, line, problem=problem)
    if size > limit:
        return Document(file, line, problem=_too_long(size, limit))
    return Document(file, line, text)


def _too_long(size: int, limit: int) -> Problem:
    return Problem("too long", f"has {size:,} bytes, more than {limit:,}; raise max_document_bytes if it is meant.")


# JSON lines


def _read_lines(unit: Unit, limit: int) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with _open_lines(unit) as stream:
            end = _aligned(unit)[1] if unit.kind == "jsonl" else None
            for number, (line, size) in enumerate(_lines(stream, end, limit), start=1):
                yield number, _too_long(size, limit) if size > limit else _record(line)
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
    stream.seek(_aligned(unit)[0])
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


@functools.lru_cache(maxsize=64)
def _aligned(unit: Unit) -> tuple[int, int]:
    """The byte range of the lines that start inside a unit."""
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


# Text files


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


def _read_texts(unit: Unit, limit: int) -> Iterator[Document]:
    for name in unit.files:
        size = Path(name).stat().st_size
        if size > limit:
            yield Document(name, 0, problem=_too_long(size, limit))
            continue
        try:
            # newline="": a file is tokenised as it stands, whatever its line ends.
            with open(name, encoding="utf-8", newline="") as stream:
                text = stream.read()
        except UnicodeDecodeError as err:
            problem = Problem("not UTF-8", f"is not UTF-8 text ({err}); convert it first.")
            yield Document(name, 0, problem=problem)
            continue
        yield _checked(name, 0, text, limit)


# Tokens


def _token_units(name: str) -> list[Unit]:
    _, spans = document_spans(name)
    units: list[Unit] = []
    first = 0
    for i, (_, end) in enumerate(spans):
        if end - spans[first][0] >= UNIT_BYTES or i == len(spans) - 1:
            units.append(Unit("tokens", (name,), first, i + 1, int(end - spans[first][0])))
            first = i + 1
    return units


def _read_tokens(unit: Unit) -> Iterator[Document]:
    name = unit.files[0]
    dtype, spans = document_spans(name)
    with open(name, "rb") as stream:
        for i in range(unit.start, unit.end):
            begin, end = map(int, spans[i])
            stream.seek(begin)
            ids = np.frombuffer(stream.read(end - begin), dtype=dtype)
            yield Document(name, i - unit.start + 1, ids=ids)


def _columns(item: Input, filters: list[Expression]) -> dict[str, bool]:
    """The fields that an input reads, and whether each must hold text."""
    if item.template is not None:
        found = dict.fromkeys(render_template(item.template)[1], True)
    elif item.turns is not None:
        found = {item.turns: False}
    else:
        found = {item.text_field: True}
    for expression in filters:
        for name in expression.fields:
            found.setdefault(name, False)
    return found
