from __future__ import annotations

import pytest

from prism_nemo.data import progress
from prism_nemo.data.build import BuildProgress
from prism_nemo.data.progress import progress_text, show_progress


def test_rate_and_time_left_follow_what_is_done() -> None:
    assert progress_text(BuildProgress("s", 25, 100, 5_000, 10.0)) == "5,000 tokens, 500 tokens/s, 0:00:30 left"
    assert progress_text(BuildProgress("s", 100, 100, 5_000, 10.0)).endswith("0:00:00 left")
    assert progress_text(BuildProgress("s", 1, 3601, 1, 1.0)).endswith("1:00:00 left")


def test_what_cannot_be_known_is_not_guessed() -> None:
    assert progress_text(BuildProgress("s", 0, 0, 10, 1.0)).endswith("time left unknown")


def test_without_a_terminal_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    with show_progress(said.append) as (say, watch):
        say("a line")
        for second in range(25):
            now[0] = float(second)
            watch(BuildProgress("s", second, 100, second * 10, float(second)))
    assert said[0] == "a line"
    assert len(said) == 3
    assert said[1].startswith("s: 10%, 100 tokens")
