"""Why a document cannot be read, and how its place is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Why a document cannot be read.

    Attributes:
        kind: A few words, the same for all documents of the kind; counted.
        message: The whole story, without file and line.
    """

    kind: str
    message: str


def place(file: str, line: int) -> str:
    """Returns `file:line`, or the file alone where the document is the file."""
    return f"{file}:{line}" if line else file


def too_long(size: int, limit: int) -> Problem:
    """Returns the problem of a document of `size` bytes where `limit` are allowed."""
    return Problem("too long", f"has {size:,} bytes, more than {limit:,}; raise max_document_bytes if it is meant.")
