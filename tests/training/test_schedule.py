"""The learning rate, against values worked out by hand and bounds that hold for any settings."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_nemo.config import ScheduleConfig
from prism_nemo.errors import InputError
from prism_nemo.training.schedule import DECAYS, check_schedule, learning_rate

STEPS = 20


def _rates(schedule: ScheduleConfig, peak: float = 1.0, steps: int = STEPS) -> list[float]:
    return [learning_rate(schedule, peak, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    rates = _rates(ScheduleConfig(lr_warmup_steps=4, decay="constant"), peak=2.0)
    assert rates[:6] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rel=1e-12)
    assert rates[-1] == 2.0


def test_without_warm_up_the_first_update_has_the_peak() -> None:
    assert _rates(ScheduleConfig(lr_warmup_steps=0))[0] == 1.0


def test_cosine_by_hand() -> None:
    """Warm-up 4, so that 16 steps decay: a quarter, half and three quarters of the way are at steps 8, 12 and 16."""
    schedule = ScheduleConfig(lr_warmup_steps=4, min_lr_ratio=0.2)
    rates = _rates(schedule)
    middle = math.sqrt(0.5) / 2
    assert [rates[i] for i in (4, 8, 12, 16)] == pytest.approx(
        [1.0, 0.2 + 0.8 * (0.5 + middle), 0.6, 0.2 + 0.8 * (0.5 - middle)], rel=1e-12
    )
    assert learning_rate(schedule, 1.0, STEPS, STEPS) == pytest.approx(0.2, rel=1e-12)
    assert learning_rate(schedule, 1.0, STEPS + 50, STEPS) == pytest.approx(0.2, rel=1e-12)


def test_linear_by_hand() -> None:
    """The study's RL schedule: no warm-up, to zero. The last update still moves."""
    schedule = ScheduleConfig(lr_warmup_steps=0, decay="linear", min_lr_ratio=0.0)
    assert _rates(schedule, peak=4.0, steps=4) == pytest.approx([4.0, 3.0, 2.0, 1.0], rel=1e-12)
    schedule = ScheduleConfig(lr_warmup_steps=2, decay="linear", min_lr_ratio=0.5)
    assert _rates(schedule, steps=6) == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625], rel=1e-12)


@given(
    warmup=st.integers(0, 50),
    decay=st.sampled_from(DECAYS),
    ratio=st.floats(0.0, 1.0),
    steps=st.integers(1, 200),
    peak=st.floats(1e-8, 1.0),
)
def test_bounds(warmup: int, decay: str, ratio: float, steps: int, peak: float) -> None:
    """Never zero before the end, never above the peak; rises while warming up, never afterwards."""
    schedule = ScheduleConfig(warmup, decay, ratio)
    check_schedule(schedule)
    rates = _rates(schedule, peak, steps)
    assert all(0.0 < rate <= peak * (1 + 1e-12) for rate in rates)
    for step in range(1, steps):
        if step < warmup:
            assert rates[step] > rates[step - 1]
        else:
            assert rates[step] <= rates[step - 1] * (1 + 1e-12) or step == warmup
            assert rates[step] >= ratio * peak * (1 - 1e-12)


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match=r"schedule\.decay: 'exponential' .*cosine, linear, constant"):
        check_schedule(ScheduleConfig(decay="exponential"))
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"schedule\.min_lr_ratio"):
            check_schedule(ScheduleConfig(min_lr_ratio=ratio))
    with pytest.raises(InputError, match=r"schedule\.lr_warmup_steps"):
        check_schedule(ScheduleConfig(lr_warmup_steps=-1))
