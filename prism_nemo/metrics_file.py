"""A `metrics.jsonl` that still grows: each look reads only the lines that were added since the look before."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.report.columns import Columns, Numbers, parse_lines
from prism_nemo.status.files import open_file

_CHUNK = 8 << 20  # Also the longest line that is read: a longer one is unreadable, and never held in memory as a whole.
_SEAM = 64


class MetricsFile(Columns):
    """The readable numbers of a metrics file, as `Columns` gives them, kept up to date by `refresh`.

    Args:
        path: The file. It need not exist yet.

    Attributes:
        unreadable: Complete lines that are no JSON objects, or longer than 8 MiB.
        lines: Readable lines.
        last: The last readable line, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.bad, self.torn, self.lines, self.unreadable = 0, False, 0, 0
        self.last: dict[str, Any] | None = None
        self._parts, self._kept = {}, {}
        self._offset, self._seam, self._skipping = 0, b"", False
        self._file: tuple[int, int] | None = None

    def refresh(self) -> bool:
        """Read the complete lines that were added; a last line without its end waits for the next time.

        A file that became shorter, or was replaced by another, is read anew. One that vanished keeps its numbers.

        Returns:
            Whether anything was read.

        Raises:
            InputError: If the path is no regular file. It is never waited for, as a named pipe would have it.
            OSError: If the file cannot be read.
        """
        try:
            file = open_file(self.path)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise InputError(f"{self.path} is no regular file; point to the directory of a run") from None
        with file:
            handle = file.fileno()
            found = os.fstat(handle)
            if self._replaced(handle, found):
                self._forget()
            self._file = (found.st_dev, found.st_ino)
            read = False
            while (chunk := os.pread(handle, _CHUNK, self._offset)) and self._take(chunk):
                read = True
            return read

    def series(self, key: str, inner: str | None = None) -> tuple[Numbers, Numbers]:
        """As `Columns.series`; what was put in order once is not put in order again."""
        found = super().series(key, inner)
        name = (key,) if inner is None else (key, inner)
        if name in self._parts:
            self._parts[name] = [found]
        return found

    def _replaced(self, handle: int, found: os.stat_result) -> bool:
        if self._file is None:
            return False
        # The seam: a file rewritten in place may be as long as before, or longer.
        start = self._offset - len(self._seam)
        return (
            (found.st_dev, found.st_ino) != self._file
            or found.st_size < self._offset
            or os.pread(handle, len(self._seam), start) != self._seam
        )

    def _take(self, chunk: bytes) -> bool:
        """Use what is complete of a chunk; False if nothing is, and more must be written first."""
        end = chunk.find(b"\n") + 1 if self._skipping else chunk.rfind(b"\n") + 1
        if self._skipping:
            end = end or len(chunk)
            self._skipping = not chunk[:end].endswith(b"\n")
        elif end:
            lines = chunk[:end].split(b"\n")
            rows, bad = parse_lines([line for line in lines if line.strip()])
            self.unreadable += len(bad)
            self._add(rows)
            self._kept.clear()
            self.last = rows[-1] if rows else self.last
        elif len(chunk) == _CHUNK:
            self._skipping, end = True, len(chunk)
            self.unreadable += 1
        else:
            return False
        self._offset += end
        self._seam = (self._seam + chunk[:end])[-_SEAM:]
        return True
