"""Learning rate as a function of the step: no state, so nothing to restore."""

from __future__ import annotations

import math

from prism_nemo.config import ScheduleConfig
from prism_nemo.errors import InputError

DECAYS = ("cosine", "linear", "constant")


def check_schedule(schedule: ScheduleConfig) -> None:
    """Refuse a schedule that does not exist.

    Raises:
        InputError: Naming the key.
    """
    if schedule.decay not in DECAYS:
        raise InputError(f"schedule.decay: '{schedule.decay}' is unknown; choose one of {', '.join(DECAYS)}")
    if schedule.lr_warmup_steps < 0:
        raise InputError(f"schedule.lr_warmup_steps: {schedule.lr_warmup_steps} is negative")
    if not 0.0 <= schedule.min_lr_ratio <= 1.0:
        raise InputError(f"schedule.min_lr_ratio: {schedule.min_lr_ratio} is not between 0 and 1")


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, train_steps: int) -> float:
    """Learning rate of an update.

    Args:
        schedule: Warm-up and decay.
        peak: Highest value.
        step: Updates done before this one, from 0.
        train_steps: Updates of the whole stage.

    Returns:
        Linear warm-up over ``lr_warmup_steps`` (the first update already has 1/warm-up of the peak), then decay that
        reaches ``min_lr_ratio`` of the peak at `train_steps`.
    """
    warmup = schedule.lr_warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.decay == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, train_steps - warmup))
    shape = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.decay == "cosine" else 1.0 - done
    return peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * shape)
