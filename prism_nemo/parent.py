"""A process that ends with the one that started it, however that happens."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

import psutil

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process when the thread that started it ends; processes started here do not inherit it.

    Args:
        parent: Process id of the one that started this one, as known to it.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def end_with_command() -> None:
    """The same for a worker that multiprocessing's fork server started.

    It ends with the server, and the server with the command (see preload.py, which the server imports).
    """
    end_with_parent(os.getppid())
    command = multiprocessing.parent_process()
    if command is not None and not psutil.pid_exists(command.pid or 0):  # it ended before the call
        os._exit(1)
