"""Peak memory of this process and everything it started."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Watches the resident memory of a process tree while open; pages shared by forked workers are counted once per
    process, so the figure is an upper bound.

    Attributes:
        peak_gb: Largest sum seen so far, in 10^9 bytes.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.peak_gb = 0.0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._stop.wait(self._interval):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak_gb = max(self.peak_gb, total / 1e9)
