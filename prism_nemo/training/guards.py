"""What stops a run: a signal, a time limit, or numbers that are no longer numbers."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from prism_nemo.errors import PrismError


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) and a time limit into a question asked once per step.

    All ranks must stop at the same step, so the answer is agreed on with one small all-reduce.
    """

    def __init__(self, max_seconds: float | None, device: torch.device) -> None:
        self.device = device
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.reason: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

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


def check_finite(step: int, **values: float) -> None:
    """Stop before a broken update is saved over a good one.

    Raises:
        PrismError: Naming the value and the step.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise PrismError(
                f"step {step}: {name} is {value}; the run stops here. The last checkpoint is from before: lower the "
                "learning rate or look at the batch, then run the same command again"
            )
