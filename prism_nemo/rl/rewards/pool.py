"""Processes in which verifiers may hang, crash or eat memory without harm to the run.

Each worker is a program of its own (`worker.py`), started anew and never forked from the trainer, which has threads and
process groups. It gets one job at a time; when that takes too long the worker is killed, the job has no verdict, and
another worker takes its place.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prism_nemo.errors import PrismError
from prism_nemo.rl.rewards.task import Problem

if TYPE_CHECKING:
    from prism_nemo.rl.rewards.verifier import Verifier

HEADER = struct.Struct("<Q")
# Importing a verifier's libraries is not the answer's fault: its time counts apart.
_START_SECONDS = 120.0
# A pool whose workers cannot even start would replace them for ever.
_MOST_FAILED_STARTS = 3


@dataclass(frozen=True)
class Verdict:
    """What a verifier gave.

    Attributes:
        value: From 0 to 1, or None.
        failure: Why there is none, in a few words that can be counted.
        detail: More about it.
    """

    value: float | None
    failure: str | None
    detail: str = ""


class _Worker:
    """One process and the job it has."""

    def __init__(self, memory_gb: float) -> None:
        # Its own session: a verifier may start processes, and all of them are ended with it.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prism_nemo.rl.rewards.worker", str(os.getpid()), str(memory_gb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self.process.stdin is not None  # asked for above
        assert self.process.stdout is not None
        self.to, self.back = self.process.stdin, self.process.stdout
        os.set_blocking(self.back.fileno(), False)
        os.set_blocking(self.to.fileno(), False)
        self.job: int | None = None
        self.deadline = 0.0
        self.received = bytearray()
        self.known: set[int] = set()  # verifiers that it has
        self.ready = False

    def send(self, message: object) -> None:
        """Until the deadline at most: a job larger than the pipe would wait for ever for a worker that does not read.

        Raises:
            BrokenPipeError: If the worker has died.
        """
        data = pickle.dumps(message)
        left = memoryview(HEADER.pack(len(data)) + data)
        room = select.poll()
        room.register(self.to.fileno(), select.POLLOUT)
        while left:
            if not room.poll(1000 * max(0.0, self.deadline - time.monotonic())):
                return  # the job is overdue, which `VerifierPool.run` sees next
            left = left[os.write(self.to.fileno(), left) :]

    def receive(self) -> tuple[bool, list[object]]:
        """Whether the pipe has ended, and the messages that are whole: more than one may have come at once."""
        try:
            part = os.read(self.back.fileno(), 1 << 20)
        except BlockingIOError:
            return False, []
        self.received += part
        messages: list[object] = []
        while len(self.received) >= HEADER.size:
            end = HEADER.size + HEADER.unpack(self.received[: HEADER.size])[0]
            if len(self.received) < end:
                break
            messages.append(pickle.loads(bytes(self.received[HEADER.size : end])))
            del self.received[:end]
        return not part, messages

    def kill(self) -> int:
        """End it and all it started; returns its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        for pipe in (self.to, self.back):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return code


class VerifierPool:
    """Runs verifiers in worker processes.

    Args:
        workers: Processes.
        time_limit: Seconds for one verdict; a verifier with a longer `time_limit` of its own gets that.
        memory_gb: Address space of a worker.
    """

    def __init__(self, workers: int, time_limit: float, memory_gb: float) -> None:
        self._count, self._time_limit, self._memory_gb = workers, time_limit, memory_gb
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._verifiers: list[Verifier] = []
        self._failed_starts = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._workers):
            self._end(worker)

    def run(self, jobs: Sequence[tuple[Verifier, Problem, str]]) -> list[Verdict]:
        """Verdicts in the order of the jobs.

        Raises:
            PrismError: If workers cannot be started.
        """
        verdicts: list[Verdict | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
            self._end(worker)  # died while it had nothing to do, so no job is at fault
        while len(self._workers) < min(self._count, len(jobs)):
            self._start()
        for worker in self._workers:
            self._give(worker, jobs, waiting)
        while any(worker.job is not None for worker in self._workers):
            busy = [worker for worker in self._workers if worker.job is not None]
            nearest = min(worker.deadline for worker in busy)
            for key, _ in self._selector.select(max(0.0, nearest - time.monotonic())):
                self._hear(key.data, jobs, verdicts)
            for worker in list(self._workers):
                if worker.job is not None and time.monotonic() >= worker.deadline:
                    verdicts[worker.job] = Verdict(None, "timeout")
                    self._failed_starts += not worker.ready
                    self._end(worker)
                    self._check_starts(f"not ready after {_START_SECONDS:g} seconds")
            while len(self._workers) < min(self._count, len(waiting) + sum(w.job is not None for w in self._workers)):
                self._start()
            for worker in self._workers:
                if worker.job is None:
                    self._give(worker, jobs, waiting)
        return [verdict if verdict is not None else Verdict(None, "no verdict") for verdict in verdicts]

    def _start(self) -> None:
        worker = _Worker(self._memory_gb)
        self._workers.append(worker)
        self._selector.register(worker.back, selectors.EVENT_READ, worker)

    def _end(self, worker: _Worker) -> int:
        self._selector.unregister(worker.back)
        self._workers.remove(worker)
        return worker.kill()

    def _give(self, worker: _Worker, jobs: Sequence[tuple[Verifier, Problem, str]], waiting: deque[int]) -> None:
        if not waiting:
            return
        job = waiting.popleft()
        verifier, problem, answer = jobs[job]
        number = next((n for n, known in enumerate(self._verifiers) if known is verifier), None)
        if number is None:
            number = len(self._verifiers)
            self._verifiers.append(verifier)
        worker.job = job
        # The first job of a verifier includes its imports; the worker says when those are done.
        new = number not in worker.known
        worker.deadline = time.monotonic() + (_START_SECONDS if new else self._limit(verifier))
        worker.known.add(number)
        # If it has died, the end of its pipe is read next, and the job is accounted for there.
        with contextlib.suppress(BrokenPipeError):
            worker.send((number, verifier if new else None, problem, answer))

    def _limit(self, verifier: Verifier) -> float:
        return max(self._time_limit, getattr(verifier, "time_limit", 0.0))

    def _hear(
        self, worker: _Worker, jobs: Sequence[tuple[Verifier, Problem, str]], verdicts: list[Verdict | None]
    ) -> None:
        ended, messages = worker.receive()
        for message in messages:
            if worker.job is None:
                continue
            if isinstance(message, Verdict):
                verdicts[worker.job] = message
                worker.job = None
                self._failed_starts = 0
            else:  # its imports are done
                worker.ready = True
                worker.deadline = time.monotonic() + self._limit(jobs[worker.job][0])
        if ended:
            job, code = worker.job, self._end(worker)
            if job is None:
                return
            if not worker.ready:
                self._failed_starts += 1
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            verdicts[job] = Verdict(None, "worker died", how)
            self._check_starts(how)

    def _check_starts(self, how: str) -> None:
        if self._failed_starts >= _MOST_FAILED_STARTS:
            self.close()
            raise PrismError(f"reward workers cannot be started: {self._failed_starts} failed in a row ({how})")
