"""One build at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prism_nemo.errors import InputError

LOCK = ".lock"


@contextmanager
def folder_lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """Holds a folder while the block runs. The system lets go of it when the process ends, however it ends.

    Args:
        folder: Must exist. The lock is a file in it, which is removed afterwards.
        shared: Several holders that all say so may work side by side (the tasks of a Slurm array).

    Raises:
        InputError: Somebody else holds it.
    """
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise InputError(
                f"{folder}: another build is at work here{f' ({holder})' if holder else ''}; wait for it, or choose "
                "another folder."
            ) from None
        # The holder before may have removed the file between our opening and locking it: then we hold nothing.
        try:
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        os.close(handle)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:
            pass  # other shared holders are still at work; the last one removes the file
        os.close(handle)
