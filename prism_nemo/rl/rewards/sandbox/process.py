"""One sandbox: a process that waits for a program, runs it, and is gone."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable

from prism_nemo.rl.rewards.sandbox.cgroup import ControlGroup
from prism_nemo.rl.rewards.sandbox.command import Recipe
from prism_nemo.rl.rewards.sandbox.limits import Execution

_READY = b"\x06"  # also for "taken"; see launcher.py
_CHUNK = 1 << 16
_DRAIN_SECONDS = 0.5  # for what a program wrote last, once it has ended


class NotStarted(Exception):
    """The sandbox ended, or its time to start passed, before it took a program."""


class SandboxProcess:
    """A started sandbox, for one program.

    It is started with `subprocess` alone: the caller may have threads and process groups that no Python code could
    survive between fork and exec.

    Args:
        recipe: What it is made of.
        user: User id to run as, if this process is root.
        group: That it enters.
        folder: To work in, in process mode.
    """

    def __init__(self, recipe: Recipe, user: int, group: ControlGroup, folder: str | None) -> None:
        self.user, self.folder = user, folder
        self._limits = recipe.limits
        self._group = group
        self._kills_before = group.kills()
        filter_fd = _pipe_with(recipe.seccomp) if recipe.mode == "bubblewrap" else None
        try:
            self._process = subprocess.Popen(
                recipe.command(user, group, filter_fd),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=recipe.environment | ({"HOME": folder, "TMPDIR": folder} if folder else {}),
                cwd=folder or "/",  # entered before the change of user, who may not search the folders above
                bufsize=0,
                start_new_session=True,
                pass_fds=() if filter_fd is None else (filter_fd,),
            )
        finally:
            if filter_fd is not None:
                os.close(filter_fd)

    def run(self, job: bytes, refill: Callable[[], None]) -> Execution:
        """Hand over the program and wait for its end.

        Args:
            job: As the launcher reads it.
            refill: Called once the program runs.

        Raises:
            NotStarted: If there was no sandbox to hand it to.
        """
        kept = {"stdout": bytearray(), "stderr": bytearray()}
        self._await_ready()
        started = time.monotonic()
        killed_for = self._communicate(job, started, kept, refill)
        seconds = time.monotonic() - started
        self.stop()
        if killed_for is None and kept["stdout"][:1] != _READY:
            raise NotStarted("it ended while it waited")
        del kept["stdout"][:1]
        code = self._process.returncode
        code = 128 - code if code < 0 else code
        out, err = (bytes(data[: self._limits.output_bytes]).decode("utf-8", "replace") for data in kept.values())
        return Execution(None if killed_for else code, out, err, seconds, self._reason(code, killed_for, err, seconds))

    def stop(self) -> None:
        """Kill all that is left. May be called again."""
        if self._process.returncode is None:
            self._kill_group()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _await_ready(self) -> None:
        _, stdout, stderr = self._pipes()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(self._limits.start_seconds):
                raise NotStarted(f"it was not ready after {self._limits.start_seconds:g} s")
        if os.read(stdout, 1) != _READY:
            self._kill_group()
            self._process.wait()
            error = os.read(stderr, _CHUNK).decode("utf-8", "replace").strip()
            raise NotStarted(error or f"it ended with {self._process.returncode}")

    def _communicate(
        self, job: bytes, started: float, kept: dict[str, bytearray], refill: Callable[[], None]
    ) -> str | None:
        """Write the job, keep the output; returns what the program must be killed for, if anything."""
        stdin, stdout, stderr = self._pipes()
        deadline = started + self._limits.wall_seconds
        rest: memoryview = memoryview(job)
        refilled = False
        ended = os.pidfd_open(self._process.pid)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, ended)
            selector = stack.enter_context(selectors.DefaultSelector())
            for pipe in (stdin, stdout, stderr):
                os.set_blocking(pipe, False)
            selector.register(stdin, selectors.EVENT_WRITE)
            selector.register(stdout, selectors.EVENT_READ, kept["stdout"])
            selector.register(stderr, selectors.EVENT_READ, kept["stderr"])
            selector.register(ended, selectors.EVENT_READ)
            running = True
            # A program may close its pipes and go on, or end and leave a child that holds them: wait for both.
            while running or stdout in selector.get_map() or stderr in selector.get_map():
                left = deadline - time.monotonic()
                events = selector.select(left) if left > 0 else []
                if not events:
                    return "time" if running else None
                for key, _ in events:
                    if key.fd == ended:
                        running = False
                        selector.unregister(ended)
                        self._kill_group()
                        deadline = time.monotonic() + _DRAIN_SECONDS
                    elif key.fd == stdin:
                        rest = _write(stdin, rest)
                        if not rest:
                            selector.unregister(stdin)
                            self._process.stdin.close()  # type: ignore[union-attr]
                    else:
                        data = os.read(key.fd, _CHUNK)
                        key.data.extend(data)
                        if not data:
                            selector.unregister(key.fd)
                        if len(key.data) > self._limits.output_bytes + (key.fd == stdout):
                            return "output"
                if not refilled and stdin not in selector.get_map():
                    refilled = True
                    refill()
        return None

    def _reason(self, code: int, killed_for: str | None, stderr: str, seconds: float) -> str | None:
        if killed_for:
            return killed_for
        if self._group.kills() > self._kills_before:
            return "memory"
        if code == 128 + signal.SIGXCPU or (code == 128 + signal.SIGKILL and seconds >= self._limits.cpu_seconds):
            return "cpu"
        if code == 1 and (stderr.rstrip().splitlines() or [""])[-1].startswith("MemoryError"):
            return "memory"
        return "signal" if code > 128 else None

    def _pipes(self) -> tuple[int, int, int]:
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        stdin, stdout, stderr = (pipe.fileno() for pipe in pipes if pipe is not None)
        return stdin, stdout, stderr

    def _kill_group(self) -> None:
        """The process group: in process mode nothing can leave it, else it holds bubblewrap's own processes, with which
        the process namespace ends. Only before the process was waited for: its number is its own until then."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _write(pipe: int, data: memoryview) -> memoryview:
    """Write what goes in now; returns the rest, which is nothing if the reader has gone."""
    try:
        return data[os.write(pipe, data[:_CHUNK]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _pipe_with(data: bytes) -> int:
    """The read end of a pipe that holds `data`, which must be shorter than a pipe (64 KiB)."""
    reader, writer = os.pipe()
    try:
        os.write(writer, data)
    finally:
        os.close(writer)
    return reader
