"""A line that moves: stage, step, loss, tokens/s, time left."""

from __future__ import annotations

import sys
import time
from contextlib import suppress


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    whole = int(max(0.0, seconds) + 0.5)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Rewrites one line on a terminal; elsewhere prints a line every `every` seconds.

    Args:
        stage: Name at the start of the line.
        steps: Steps of the stage.
        first: Step that this process starts from (after a resume).
        enabled: Only rank 0 prints.
        every: Seconds between lines where the output is not a terminal.
    """

    def __init__(self, stage: str, steps: int, first: int = 0, enabled: bool = True, every: float = 10.0) -> None:
        self.stage, self.steps, self.first, self.enabled = stage, steps, first, enabled
        self.terminal = sys.stderr.isatty()
        self.every = 0.2 if self.terminal else every
        self.began = self.last = time.monotonic()

    def update(self, step: int, text: str) -> None:
        """Show that `step` steps are done."""
        now = time.monotonic()
        if not self.enabled or (now - self.last < self.every and step < self.steps):
            return
        self.last = now
        done = step - self.first
        left = (now - self.began) / done * (self.steps - step) if done else 0.0
        line = f"{self.stage:<18} {step:>6}/{self.steps}  {text}  left {duration(left)}"
        end = "\n" if not self.terminal or step >= self.steps else ""
        self._write(f"\r\x1b[K{line}{end}" if self.terminal else f"{line}\n")

    def say(self, text: str) -> None:
        """A line of its own, about work that is no step."""
        if self.enabled:
            self._write(f"\r\x1b[K{text}\n" if self.terminal else f"{text}\n")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a terminal that was closed, or what read from us, must not end a run
            sys.stderr.write(text)
            sys.stderr.flush()
