"""Watching the processes of a run: one that hangs, and one that is slower than the others."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

import torch
import torch.distributed as dist

_PROBE_SIZE = 2048


class Watchdog:
    """Ends a process that makes no progress, after printing where each of its threads stands.

    A collective that one rank never joins keeps all the others waiting for ever, without a word. Every rank has its own
    watchdog, so each prints its stack, and the rank that stands elsewhere is the one to look at.

    Args:
        seconds: Without a sign of life; None never ends anything.
        rank: For the message.
    """

    EXIT_CODE = 1

    def __init__(self, seconds: float | None, rank: int) -> None:
        self._seconds, self._rank = seconds, rank
        self._last, self._doing = time.monotonic(), "starting"
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def alive(self, doing: str) -> None:
        """A sign of life, and what begins now."""
        self._last, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        limit = self._seconds or 0.0
        while not self._done.wait(min(1.0, limit / 4)):
            if time.monotonic() - self._last > limit:
                self._end(limit)

    def _end(self, limit: float) -> None:
        _print_stacks(
            f"\nprism-nemo: rank {self._rank} made no progress for {limit:.0f} s in {self._doing}; "
            "where it stands (the rank whose stack differs from the others' is the one to look at):\n"
        )
        # The first process to end takes all others with it: they are given time to say where they stand.
        time.sleep(min(10.0, max(2.0, limit / 10)))
        # Not an exception: the main thread is inside a call that does not return.
        os._exit(self.EXIT_CODE)


def _print_stacks(head: str) -> None:
    """Where each thread stands, to the standard error in one piece.

    All ranks of a machine do so at the same moment, and `faulthandler` writes word by word: on a shared pipe the words
    of two ranks would stand in each other's lines. Memory, as disks may be what hangs.
    """
    sys.stderr.flush()
    target = sys.stderr.fileno()
    try:
        memory = os.memfd_create("stacks")
    except (AttributeError, OSError):  # not Linux
        os.write(target, head.encode())
        faulthandler.dump_traceback(target, all_threads=True)
        return
    os.write(memory, head.encode())
    faulthandler.dump_traceback(memory, all_threads=True)
    text = os.pread(memory, os.fstat(memory).st_size, 0)
    while text:
        text = text[os.write(target, text) :]


class RankTimes:
    """Finds the rank that the others wait for.

    All ranks finish a step together, because they wait for each other, so step times tell nothing. What tells is how
    long each was busy itself: on a CPU the processor time of the process inside its steps (waiting takes none), on a
    GPU the time of a product of matrices of its own, without any communication.

    What only the first rank does between steps (log, monitors, manifests) is no sign of a slow machine and does not
    count. A page cache that is cold, or another program for a second, makes any rank slow once: a rank is named when
    it is slow in two windows in a row.

    Args:
        device: Of this process.
        ratio: A rank that is busy for so many times the median is slow.
    """

    def __init__(self, device: torch.device, ratio: float) -> None:
        self._device, self._ratio = device, ratio
        self._seconds, self._steps = 0.0, 0
        self._slow: int | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: its batches, its passes and its update."""
        began = time.process_time()
        yield
        self._seconds += time.process_time() - began
        self._steps += 1

    def slowest(self) -> tuple[dict[str, float], str | None]:
        """Compares the ranks over the window of steps since the last call; every rank calls this.

        Returns:
            For the log `busy_seconds` (median) and `busy_seconds_max`; and a warning that names a rank that was slow in
            this window and in the one before, or None.
        """
        mine = self._busy()
        self._seconds, self._steps = 0.0, 0
        if dist.get_world_size() == 1:
            return {}, None
        everyone = [torch.zeros(1, dtype=torch.float64, device=self._device) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, torch.tensor([mine], dtype=torch.float64, device=self._device))
        return self._compare([value.item() for value in everyone])

    def _compare(self, seconds: list[float]) -> tuple[dict[str, float], str | None]:
        # The lower of the two middle ones: of two ranks, the faster sets what is usual.
        usual, worst = statistics.median_low(seconds), max(seconds)
        values = {"busy_seconds": usual, "busy_seconds_max": worst}
        before, self._slow = self._slow, None
        if worst <= self._ratio * usual:
            return values, None
        rank = self._slow = seconds.index(worst)
        if rank != before:
            return values, None
        return values, (
            f"rank {rank} is busy for {worst:.3g} s a step, {worst / usual:.1f} times as long as most, for the second "
            "time in a row; the others wait for it. Look at its machine (heat, another job, a throttled card) or its "
            "share of the model"
        )

    def _busy(self) -> float:
        if self._device.type == "cuda":
            return _probe(self._device)
        return self._seconds / max(1, self._steps)


def _probe(device: torch.device) -> float:
    """Seconds for ten products of square matrices on this card alone."""
    a = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=torch.bfloat16, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        torch.mm(a, a)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
