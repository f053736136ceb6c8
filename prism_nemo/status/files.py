"""What a run directory says: its newest numbers, its checkpoints, and whether a process holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
import struct
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from prism_nemo.checkpoint.atomic import MANIFEST
from prism_nemo.checkpoint.lock import LOCK

_TAIL_BYTES = 256 * 1024
_MOST_BYTES = 16 << 20
# struct flock of Linux on 64 bits: type, whence, start, length, pid.
_FLOCK = "hhqqi"


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: If there is none. A named pipe is not waited for: opening one that nobody writes to would not return. A
            link is not followed: what it leads to is not the run's.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return os.fdopen(handle, "rb")


def read_text(path: Path) -> str:
    """A text file of at most 16 MiB; bytes that are no text are replaced.

    Raises:
        OSError: If there is none, or it is larger.
    """
    with open_file(path) as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise OSError(errno.EFBIG, f"larger than {_MOST_BYTES:,} bytes", str(path))
    return content.decode("utf-8", "replace")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none that can be read."""
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def last_lines(path: Path, count: int = 400) -> list[dict[str, Any]]:
    """The last lines of a metrics file, without reading all of it; a line that is being written is left out."""
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            raw = file.read().splitlines()
    except OSError:
        return []
    if size > _TAIL_BYTES:
        raw = raw[1:]  # the first one was cut off
    found = []
    for line in raw[-count:]:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found


def newest_checkpoint(run: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that was finished, and its step; sizes and hashes are not compared here."""
    found = []
    for manifest in run.glob(f"checkpoints/step_*/{MANIFEST}"):
        match = re.fullmatch(r"step_(\d+)", manifest.parent.name)
        if match:
            found.append((int(match[1]), manifest.parent))
    if not found:
        return None
    step, path = max(found)
    return path, step


def holder(run: Path) -> tuple[bool | None, dict[str, Any] | None]:
    """Whether a process holds the run's lock, and who wrote its name into it.

    Asks without taking the lock even for an instant: a run that starts just then would be refused.

    Returns:
        True or False; None where it cannot be known (another machine, and a file system without locks). And the
        process as it is written down, if one is.
    """
    path = run / LOCK
    processes = read_json(path).get("processes") or [None]
    named: dict[str, Any] | None = processes[0] if isinstance(processes[0], dict) else None
    try:
        with open_file(path) as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
        return answer[0] != fcntl.F_UNLCK, named
    except FileNotFoundError:
        return False, None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return None, named
    if named is None:
        return False, None
    if named.get("host") != socket.gethostname():
        return None, named
    return psutil.pid_exists(int(named.get("pid", -1))), named
