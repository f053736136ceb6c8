"""Curves that are made small keep their spikes, their gaps and their last value."""

from __future__ import annotations

import numpy as np
import pytest

from prism_nemo.watch.terminal import sparkline
from prism_nemo.watch.thin import newest, thin


def test_a_spike_and_the_last_value_stay() -> None:
    steps = np.arange(100_000, dtype=float)
    values = np.ones_like(steps)
    values[54_321], values[-1] = 99.0, 7.0
    points = thin(steps, values)
    assert len(points) == 240
    assert max(high for _, _, high in points if high is not None) == 99.0
    assert points[-1][0] == 99_999.0
    assert points[-1][2] == 7.0


def test_few_values_are_all_there_and_gaps_are_gaps() -> None:
    points = thin(np.array([1.0, 2.0, 3.0]), np.array([5.0, np.nan, 6.0]))
    assert points == [(1.0, 5.0, 5.0), (2.0, None, None), (3.0, 6.0, 6.0)]
    assert thin(np.empty(0), np.empty(0)) == []
    assert newest(np.array([1.0, np.nan])) is None
    assert newest(np.empty(0)) is None
    assert newest(np.array([1.0, 2.0])) == 2.0


@pytest.mark.parametrize(
    ("values", "line"),
    [([1, 2, 3, 4, 5, 6, 7, 8], "▁▂▃▄▅▆▇█"), ([3, 3], "▄▄"), ([1, None, 2], "▁ █"), ([None], " "), ([], "")],
)
def test_a_line_of_bars(values: list[float | None], line: str) -> None:
    assert sparkline([(float(i), value, value) for i, value in enumerate(values)]) == line
