"""Metrics as columns: torn and foreign lines, steps written twice, values that are no numbers; and drawing many."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from prism_nemo.report import curves
from prism_nemo.report.columns import Columns


def columns(path: Path, *lines: object, end: str = "\n") -> Columns:
    file = path / "metrics.jsonl"
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines) + end)
    return Columns(file)


def test_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    found = columns(tmp_path, {"step": 2, "loss": 9.0}, {"step": 1, "loss": 3}, {"step": 2, "loss": 2.0, "lr": 1.0})
    assert [one.tolist() for one in found.series("loss")] == [[1.0, 2.0], [3.0, 2.0]]
    assert [one.tolist() for one in found.series("reward")] == [[], []]


def test_lines_that_are_none_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    found = columns(tmp_path, {"step": 1, "loss": 1.0}, "{broken", "1, 2", "[3]", {"step": 2, "loss": 2.0}, '{"st')
    assert (found.bad, found.torn, found.lines) == (3, True, 2)
    assert found.series("loss")[1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", [True, None, "1", [1], {}])
def test_what_is_no_number_is_not_taken_for_one(tmp_path: Path, value: object) -> None:
    found = columns(tmp_path, {"step": 1, "loss": value}, {"step": 2, "loss": 5.0})
    assert [one.tolist() for one in found.series("loss")] == [[2.0], [5.0]]


def test_a_value_that_is_not_finite_stays_as_nan(tmp_path: Path) -> None:
    found = columns(
        tmp_path, *({"step": i, "loss": value} for i, value in enumerate((1.0, math.inf, math.nan, 10**400)))
    )
    assert np.isnan(found.series("loss")[1]).tolist() == [False, True, True, True]


def test_inner_values(tmp_path: Path) -> None:
    found = columns(tmp_path, {"step": 1, "r": {"a": 0.5}}, {"step": 2, "r": {"b": 1}}, {"step": 3, "r": 4})
    assert found.inner_names("r") == ["a", "b"]
    assert [one.tolist() for one in found.series("r", "b")] == [[2.0], [1.0]]


def test_a_spike_and_the_ends_survive_condensing() -> None:
    x = np.arange(1.0, 1_000_001)
    y = np.ones_like(x)
    y[777_777], y[5] = 50.0, -3.0
    at, mean, low, high = curves.condense(x, y)
    assert len(at) == curves.MOST_POINTS
    assert (at[0], at[-1]) == (1.0, 1_000_000.0)
    assert (max(high), min(low)) == (50.0, -3.0)
    assert np.mean(mean) == pytest.approx(y.mean(), rel=1e-4)


def test_a_short_series_is_drawn_as_it_is() -> None:
    assert curves.condense(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == ([1.0, 2.0], [3.0, 4.0], [], [])
