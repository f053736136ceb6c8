"""One run per directory: a lock that ends with the process, and the end of what a killed run left running."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from prism_nemo.errors import InputError

LOCK = "running.json"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def describe_process(pid: int) -> dict[str, Any]:
    """What identifies a process for longer than its number does: host, number and start time."""
    return {"host": socket.gethostname(), "pid": pid, "created": psutil.Process(pid).create_time()}


def _living(process: dict[str, Any]) -> psutil.Process | None:
    """The process, if it runs on this host; a number that was given again to another one is not it."""
    try:
        found = psutil.Process(int(process["pid"]))
        same = process["host"] == socket.gethostname() and abs(found.create_time() - process["created"]) < 1.0
        return found if same and found.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None


class RunLock:
    """Holds ``running.json`` of a run directory locked until `release`, or until this process ends.

    A POSIX record lock: the kernel, or the file server, drops it when its process ends, so what is left of a killed run
    does not have to be guessed at; and a forked child does not inherit it. Only one process of a run holds it.

    Args:
        directory: Of the run.

    Raises:
        InputError: If another run holds it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._read()
            # Where the file system has no locks, the process that is named in the file tells.
            if error.errno not in _NO_LOCKS or (holder and _living(holder[0])):
                os.close(self._file)
                raise InputError(
                    f"{directory}: {_who(holder)} is running in it; stop that run or use another run_dir"
                ) from error
        self.left_over = self._read()

    def _read(self) -> list[dict[str, Any]]:
        try:
            content = json.loads(os.pread(self._file, 2**24, 0) or b"{}")
            return list(content.get("processes", []))
        except (ValueError, AttributeError):
            return []  # written by a run that was killed while it wrote it

    def record(self, processes: list[dict[str, Any]]) -> None:
        """Say who runs: the processes of the run, that of rank 0 first, and their writers."""
        text = json.dumps({"processes": processes}, indent=2) + "\n"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)

    def end_left_over(self, seconds: float = 10.0) -> list[int]:
        """End the processes on this host that a killed run left: ranks without their peers, and writers.

        Returns:
            Their numbers.
        """
        ended = []
        for process in self.left_over:
            found = _living(process)
            if found is None or found.pid == os.getpid():
                continue
            try:
                os.kill(found.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            ended.append(found.pid)
        deadline = time.monotonic() + seconds
        while any(_living(p) for p in self.left_over if p.get("pid") in ended) and time.monotonic() < deadline:
            time.sleep(0.01)
        return ended

    def release(self) -> None:
        """Let others run here; the file stays, empty."""
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1


def _who(holder: list[dict[str, Any]]) -> str:
    if not holder:
        return "another run"
    return f"process {holder[0].get('pid')} on {holder[0].get('host')}"
