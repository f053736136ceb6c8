"""Files and folders written once, from front to back, and brought to disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from prism_nemo.checkpoint.atomic import remove_leftovers, temporary_name
from prism_nemo.errors import InputError, PrismError

T = TypeVar("T")
# Written in windows of this size: as soon as one is full the kernel is told to write it out, and the one before the
# last is waited for and dropped from the page cache. A writer that fills the cache with gigabytes instead pays for each
# fresh page, on a virtual machine with seconds of system time: 0.3 to 0.4 GB/s were seen where windows gave 1.6 to 1.8
# (2 GB, one core; `cp` 1.5 to 1.9). It also leaves other programs' files in the cache.
_WINDOW = 32 * 2**20
_WRITE, _WRITE_AND_WAIT = 2, 7  # linux/fs.h, SYNC_FILE_RANGE_*
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP)


def _sync_file_range() -> Any:
    """The C library's function, or None where there is none: then the final fsync does all the work."""
    try:
        return ctypes.CDLL("libc.so.6", use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None


class WriteFile:
    """A new file that is only appended to.

    Args:
        path: Must not exist.

    Attributes:
        position: Bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = self._begun = 0
        self._sync_range = _sync_file_range()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, data: Any) -> None:
        """Append bytes."""
        view = memoryview(data)
        while len(view):
            count = os.write(self._descriptor, view)
            self.position += count
            view = view[count:]
        while self._sync_range is not None and self.position - self._begun >= _WINDOW:
            self._write_out(self._begun, _WRITE)
            done = self._begun - 2 * _WINDOW
            if done >= 0:
                self._write_out(done, _WRITE_AND_WAIT)
                os.posix_fadvise(self._descriptor, done, _WINDOW, os.POSIX_FADV_DONTNEED)
            self._begun += _WINDOW

    def _write_out(self, start: int, how: int) -> None:
        failed = self._sync_range(self._descriptor, ctypes.c_int64(start), ctypes.c_int64(_WINDOW), how)
        error = ctypes.get_errno() if failed else 0
        if error in _NOT_HERE:
            self._sync_range = None
        elif error:
            # Reported once only: the final fsync would not know of it.
            raise OSError(error, os.strerror(error), str(self.path))

    def sync(self) -> None:
        """Bring everything to disk and close."""
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Close without waiting for the disk."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_ahead(blocks: Iterator[T]) -> Iterator[T]:
    """The same blocks, the next one read by another thread while this one is used; each must have memory of its own.

    Reading and writing are copies between memory and the page cache, which the interpreter's lock does not cover.
    """
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


def begin(final: Path, size: int) -> Path:
    """Make the folder that will become `final`, and look whether `size` bytes fit on its disk.

    Raises:
        InputError: If `final` exists, its folder cannot be made, or the disk is too small.
    """
    if os.path.lexists(final):
        raise InputError(f"{final}: already exists; remove it or choose another name")
    temporary = temporary_name(final)
    remove_leftovers(final)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{temporary}: cannot be created: {error.strerror}") from error
    free = shutil.disk_usage(temporary).free
    if free < size:
        temporary.rmdir()
        raise InputError(f"{final}: needs {size / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free")
    return temporary


@contextlib.contextmanager
def clean_failure(final: Path) -> Iterator[None]:
    """Errors of the system while writing `final`, as one message.

    Raises:
        PrismError: For a full disk and the like.
    """
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise PrismError(f"{final}: writing failed: {what}; nothing was left behind") from error
