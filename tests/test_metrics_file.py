"""A metrics file that grows, is torn, replaced, or hostile."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import prism_nemo.metrics_file as module
from prism_nemo.errors import InputError
from prism_nemo.metrics_file import MetricsFile


def add(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_only_complete_lines_count_and_a_torn_one_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    assert not metrics.refresh()
    assert metrics.last is None
    add(path, '{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert metrics.refresh()
    assert metrics.series("loss")[1].tolist() == [2.0]
    assert not metrics.refresh()
    assert metrics.unreadable == 0
    add(path, 'ss": 1.5}\n')
    assert metrics.refresh()
    assert metrics.series("loss")[1].tolist() == [2.0, 1.5]
    assert metrics.last == {"step": 2, "loss": 1.5}
    assert metrics.lines == 2


def test_a_step_written_again_after_a_look_counts_with_its_later_value(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for loss in (3.0, 2.0, 1.0):
        add(path, f'{{"step": 5, "loss": {loss}, "by": {{"a": {loss}}}}}\n{{"step": 4, "loss": NaN}}\n')
        metrics.refresh()
        steps, values = metrics.series("loss")
        assert steps.tolist() == [4.0, 5.0]
        assert np.isnan(values[0])
        assert values[1] == loss
    assert metrics.series("by", "a")[1].tolist() == [1.0]
    assert metrics.inner_names("by") == ["a"]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_replaced_file_is_read_anew_even_when_it_is_longer(tmp_path: Path, in_place: bool) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    add(path, '{"step": 1, "loss": 9}\n')
    metrics = MetricsFile(path)
    metrics.refresh()
    new = '{"step": 7, "loss": 1}\n{"step": 8, "loss": 2}\n'
    if in_place:
        path.write_text(new)
    else:
        add(other, new)
        other.replace(path)
    assert metrics.refresh()
    assert metrics.series("loss")[0].tolist() == [7.0, 8.0]
    assert metrics.lines == 2


def test_a_file_that_vanished_keeps_its_numbers_and_a_shorter_one_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    add(path, '{"step": 1, "loss": 9}\n{"step": 2, "loss": 8}\n')
    metrics = MetricsFile(path)
    metrics.refresh()
    os.truncate(path, 23)
    metrics.refresh()
    assert metrics.series("loss")[0].tolist() == [1.0]
    path.unlink()
    assert not metrics.refresh()
    assert metrics.lines == 1


def test_bad_and_endless_lines_are_counted_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)
    path = tmp_path / "metrics.jsonl"
    add(path, '{"step": 1, "loss": 1}\nno json\n' + "x" * 500)
    metrics = MetricsFile(path)
    metrics.refresh()
    add(path, "x" * 90 + '\n{"step": 2, "loss": 2}\n' + "[" * 60 + "\n")
    metrics.refresh()
    assert metrics.unreadable == 3
    assert metrics.series("loss")[0].tolist() == [1.0, 2.0]


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="no regular file"):
        MetricsFile(tmp_path / "metrics.jsonl").refresh()
