"""Reading documents out of files: JSON lines (plain or gzip) and plain text, one document per line or per file."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prism_nemo.data.mixture import JSONL_SUFFIXES, Source
from prism_nemo.errors import InputError


def read_documents(source: Source) -> Iterator[str]:
    """Yields the documents of a source, files in their listed order; documents without a character are left out.

    Raises:
        InputError: A broken JSON line, a line without the text field, or bytes that are not UTF-8; the message has
            the file and, for JSON lines, the line number.
    """
    for name in source.paths:
        if name.endswith(JSONL_SUFFIXES):
            yield from _read_jsonl(name, source.text_field)
        else:
            try:
                # newline="": a file is tokenised as it stands, whatever its line ends.
                with open(name, encoding="utf-8", newline="") as stream:
                    text = stream.read()
            except UnicodeDecodeError as err:
                raise InputError(f"{name}: is not UTF-8 text ({err}); convert it first.") from err
            if text:
                yield text


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_jsonl(name: str, text_field: str) -> Iterator[str]:
    number = 0
    try:
        with _open_binary(name) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                text = _text_of(line, text_field, f"{name}:{number}")
                if text:
                    yield text
    except (EOFError, gzip.BadGzipFile, zlib.error) as err:
        raise InputError(f"{name}: the gzip stream is damaged after line {number} ({err}); copy it again.") from err


def _text_of(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as err:
        raise InputError(f"{where}: is not UTF-8 text ({err}).") from err
    except json.JSONDecodeError as err:
        raise InputError(f"{where}: is not JSON: {err}. Every line must be one object.") from err
    if not isinstance(record, dict):
        raise InputError(f"{where}: must be an object with the field {text_field!r}, found {type(record).__name__}.")
    if text_field not in record:
        raise InputError(
            f"{where}: has no field {text_field!r}; its fields: {', '.join(record) or 'none'}. "
            "Set `text_field` of the source in the mixture."
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {text_field!r} must be text, found {type(text).__name__}.")
    try:
        text.encode("utf-8")  # JSON can write half a surrogate pair, which the tokenizer rejects without saying where
    except UnicodeEncodeError as err:
        raise InputError(f"{where}: field {text_field!r} holds half a surrogate pair ({err}); repair it.") from err
    return text


def _open_binary(name: str) -> IO[bytes]:
    # Lines are split at b"\n" alone: str.splitlines would also split at U+2028, which JSON allows inside a string.
    return gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb")  # type: ignore[return-value]
