"""Signals that ask a command to stop: to whom they go, and what is left of its terminal."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_HELD = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT}


def stopping_signals() -> list[signal.Signals]:
    """Those of `STOPPING` that mean something here: under nohup a terminal that is closed is no reason to stop."""
    return [n for n in STOPPING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def outlive_signals() -> None:
    """Let signals to a whole group of processes pass by this one, multiprocessing's fork server, but not its workers.

    A terminal that is closed, `timeout`, Slurm and `kill` with a group's id reach every process. The workers would end
    with the server, when they should finish a step and save. SIGINT it ignores by itself.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)  # not ignored, which workers would inherit
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD))


def start_resource_tracker() -> None:
    """Start the process with which multiprocessing counts its semaphores, so that it outlives such signals as well.

    It knows SIGINT and SIGTERM itself; started anew it would fill the terminal with errors about what it never saw.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_closed_terminal() -> None:
    """Send output that nobody can read any more to nowhere: writing it would be an error, before the checkpoint."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


class PassedOn:
    """Passes signals on to workers, who decide what they mean.

    A stage finishes its step, saves and says so by `StoppedEarly`; what knows no signals ends at once. torch's agent,
    left to itself, would give both 30 s, kill, and take every end for the signal's.

    Args:
        folder: An empty one: workers leave their process ids, and signals are kept for those that are not up yet.

    Attributes:
        last: The last signal that was passed on, or None.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.last: int | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """While workers run; only the main thread can handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._received) for number in stopping_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.last == signal.SIGHUP:
                leave_closed_terminal()

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.last = number
        (self._folder / f"signal{number}").touch()  # before: a worker leaves its id, then looks
        for file in self._folder.glob("worker*"):
            with suppress(ProcessLookupError):
                os.kill(int(file.name.removeprefix("worker")), number)
        name = signal.Signals(number).name
        with suppress(OSError):  # no terminal any more
            sys.stderr.write(f"{name}: a stage finishes its step and saves; SIGQUIT (Ctrl-\\) ends all at once\n")


def take_part(folder: Path) -> None:
    """Let this worker get what a `PassedOn` of that folder passes on, also what it has passed on already."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torch takes a KeyboardInterrupt for a good end, and waits for ever
    (folder / f"worker{os.getpid()}").touch()
    for file in folder.glob("signal*"):
        os.kill(os.getpid(), int(file.name.removeprefix("signal")))
