"""Runs a Python program in a sandbox of its own, taken from a few that were started ahead.

Starting an interpreter behind its walls takes some 30 ms, most of it waiting for the kernel. So `Sandbox` keeps started
ones, each waiting for its program on a pipe. Each is used once: no program meets what another left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from prism_nemo.errors import InputError, PrismError
from prism_nemo.rl.rewards.sandbox.cgroup import ControlGroup, make_group, sweep
from prism_nemo.rl.rewards.sandbox.command import make_recipe, user_of
from prism_nemo.rl.rewards.sandbox.limits import Execution, SandboxLimits
from prism_nemo.rl.rewards.sandbox.process import NotStarted, SandboxProcess

_LOG = logging.getLogger(__name__)
_NUMBERS = itertools.count()  # of users and control groups; one process may have several `Sandbox`
_FOLDER = "prism-nemo-sandbox-"
_PROCESS_MODE = (
    "rewards.sandbox=process is weaker than bubblewrap: programs written by the model can read every file that others "
    "may read, and write where all may; they see the processes of this machine and, without root, can do to files all "
    "that this user can. Memory, time, processes, output and system calls (no sockets, no signals) are limited."
)
# A program that does a little of what programs do; its failure means that right answers would be scored 0.
_TRIAL = """
import os, subprocess, sys, threading
child = os.fork()
if child == 0:
    os._exit(7)
assert os.waitpid(child, 0)[1] >> 8 == 7
thread = threading.Thread(target=print, args=(input(),))
thread.start()
thread.join()
open("file", "w").write("text")
"""


class Sandbox:
    """Runs programs, each in a sandbox of its own. Safe to call from several threads. Close it, or use ``with``.

    A sandbox dies with the thread that started it, so that none outlives a killed worker (the kernel tells it of the
    end of its parent, which is a thread); hence each thread uses those that it started itself.

    Args:
        limits: Of each execution.
        mode: ``bubblewrap``, or ``process`` (weaker; see `_PROCESS_MODE`, which is logged as a warning).
        ready: Sandboxes started ahead.
        warn: Whether to log what process mode does not protect from.

    Raises:
        InputError: If the mode cannot be had here; the message names the package that is missing.
    """

    def __init__(
        self, limits: SandboxLimits | None = None, mode: str = "bubblewrap", ready: int = 1, warn: bool = True
    ) -> None:
        self.limits = limits or SandboxLimits()
        self.mode = mode
        self._recipe = make_recipe(mode, self.limits)
        self._ready = ready
        self._lock = threading.Lock()
        self._reset()
        if mode == "process" and warn:
            _LOG.warning(_PROCESS_MODE)
        sweep()
        if mode == "process":
            _sweep_folders()
        _OPEN.add(self)

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._waiting: dict[int, deque[tuple[int, SandboxProcess]]] = {}  # by the thread that started them
        self._free: list[int] = []
        self._groups: list[ControlGroup] = []

    def run(self, program: str, stdin: str | bytes = "", files: Mapping[str, str | bytes] | None = None) -> Execution:
        """Run a program to its end, or to the first limit that it hits.

        Args:
            program: Python source; runs as ``__main__`` in a folder of its own.
            stdin: What it can read.
            files: Name -> content; written into its folder first.

        Raises:
            InputError: For a file name with a folder in it.
            PrismError: If no sandbox could be started; what the program does raises nothing.
        """
        for name in files or {}:
            if not name or "/" in name or "\0" in name:
                raise InputError(f"sandbox: '{name}' is no plain file name")
        job = _encode(program, stdin, files or {})
        for attempt in (0, 1):
            number, process = self._take(fresh=attempt > 0)
            try:
                return process.run(job, refill=self._refill)
            except NotStarted as error:
                # One that was started ahead may have been lost since, with the thread that started it.
                if attempt:
                    raise PrismError(
                        f"rewards.sandbox={self.mode}: the sandbox could not be started: {error}"
                    ) from None
            finally:
                self._release(number, process)
        raise AssertionError("unreachable")

    def check(self) -> None:
        """Run a harmless program.

        Raises:
            InputError: If it does not work here; a right answer would be scored 0 for it.
        """
        try:
            told = self.run(_TRIAL, "works\n")
        except PrismError as error:
            raise InputError(str(error)) from None
        if told.exit_code != 0 or told.stdout != "works\n":
            why = (told.stderr.strip() or told.stdout or f"killed by {told.killed_by}")[-500:]
            raise InputError(f"rewards.sandbox={self.mode}: a harmless program failed in the sandbox: {why}")

    def close(self) -> None:
        """Stop the sandboxes that wait, and remove their control groups."""
        with self._lock:
            if self._owner != os.getpid():  # a forked copy: they belong to the parent
                return
            waiting = [entry for entries in self._waiting.values() for entry in entries]
            self._waiting.clear()
        for entry in waiting:
            self._release(*entry)
        with self._lock:
            for number in self._free:
                self._groups[number].remove()
            self._reset()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, fresh: bool) -> tuple[int, SandboxProcess]:
        with self._lock:
            if self._owner != os.getpid():
                self._reset()
            living = {thread.ident for thread in threading.enumerate()}
            lost = [entry for ident in self._waiting.keys() - living for entry in self._waiting.pop(ident)]
            own = self._waiting.setdefault(threading.get_ident(), deque())
            taken = own.popleft() if own and not fresh else self._start()
        for entry in lost:
            self._release(*entry)
        return taken

    def _refill(self) -> None:
        """Start the next one, while the present program runs."""
        with self._lock:
            own = self._waiting[threading.get_ident()]
            while len(own) < self._ready:
                own.append(self._start())

    def _start(self) -> tuple[int, SandboxProcess]:
        if not self._free:
            self._free.append(len(self._groups))
            self._groups.append(make_group(next(_NUMBERS), self.limits.memory_bytes))
        number = self._free.pop()
        user, folder = user_of(next(_NUMBERS)), None
        if self.mode == "process":
            folder = tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-")
            if self._recipe.setpriv:
                os.chown(folder, user, user)
        return number, SandboxProcess(self._recipe, user, self._groups[number], folder)

    def _release(self, number: int, process: SandboxProcess) -> None:
        """Stop what is left of a sandbox; its control group is free once nothing of it runs."""
        process.stop()
        if process.folder:
            shutil.rmtree(process.folder, ignore_errors=True)
        if not self._groups[number].empty():
            _LOG.warning("sandbox %d: processes of a program could not be stopped; its group is not used again", number)
            return
        with self._lock:
            self._free.append(number)


def _sweep_folders() -> None:
    """Remove folders of process mode whose process was killed before it could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        owner = folder.name.removeprefix(_FOLDER).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _encode(program: str, stdin: str | bytes, files: Mapping[str, str | bytes]) -> bytes:
    """What the launcher reads; surrogates, which a decoded response may hold, become question marks."""

    def data(text: str | bytes) -> bytes:
        return text if isinstance(text, bytes) else text.encode("utf-8", "replace")

    def blob(text: str | bytes) -> bytes:
        return len(data(text)).to_bytes(8, "little") + data(text)

    parts = [len(files).to_bytes(8, "little")]
    for name, content in files.items():
        parts += [blob(name), blob(content)]
    return b"".join([*parts, blob(program), data(stdin)])


_OPEN: weakref.WeakSet[Sandbox] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for sandbox in list(_OPEN):
        with contextlib.suppress(Exception):
            sandbox.close()
