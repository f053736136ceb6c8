"""Stopping on request: a signal, or a time limit."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from prism_nemo.runtime.signals import leave_closed_terminal, stopping_signals

# Left for the last step, the checkpoint and the end of the process when Slurm's limit comes.
_SLURM_MARGIN = 120.0


def slurm_seconds_left(now: float) -> float | None:
    """Seconds until Slurm ends the job, less a margin for a checkpoint; None outside of Slurm.

    Args:
        now: Seconds since the epoch, as `SLURM_JOB_END_TIME` counts.
    """
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return max(0.0, float(end) - now - _SLURM_MARGIN) if end.isdigit() else None


class StopRequest:
    """Turns signals (SIGTERM, SIGINT, SIGHUP, Slurm's SIGUSR1) and time limits into a question asked each step.

    All ranks must stop at the same step, so the answer is agreed on with one small all-reduce.
    """

    def __init__(self, max_seconds: float | None, device: torch.device) -> None:
        self.device = device
        limits = [limit for limit in (max_seconds, slurm_seconds_left(time.time())) if limit is not None]
        self.deadline = time.monotonic() + min(limits) if limits else None
        self.reason: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in stopping_signals():
            self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reason is not None:
            return  # the process is about to end, having saved; one more signal must not make that look like a death
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGHUP:
            leave_closed_terminal()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = self.reason or "time limit"
        if dist.get_world_size() == 1:
            return self.reason is not None
        flag = torch.tensor([float(self.reason is not None)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        stop = bool(flag.item())
        if stop:
            self.reason = self.reason or "another rank was asked to stop"
        return stop
