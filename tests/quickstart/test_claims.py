"""The expected effects are judged by intervals, and can fail."""

from __future__ import annotations

from typing import Any

from prism_nemo.quickstart.claims import expected_claims

WIDTH = 0.03


def _stages(**accuracy: tuple[float, float]) -> dict[str, Any]:
    return {
        stage: {"tasks": {f"t{i}": {"accuracy": a, "ci95": [a - WIDTH, a + WIDTH]} for i, a in enumerate(values)}}
        for stage, values in accuracy.items()
    }


def _holds(**changes: tuple[float, float]) -> list[bool]:
    good = {"base": (0.0, 0.0), "midtrained": (0.5, 0.6), "base_rl": (0.02, 0.05), "prism_rl": (0.6, 0.6)}
    return [claim["holds"] for claim in expected_claims(_stages(**{**good, **changes}))]


def test_all_hold_when_intervals_are_apart() -> None:
    assert _holds() == [True, True, True]


def test_one_family_without_a_clear_gain_is_enough_to_fail_the_first_two() -> None:
    assert _holds(midtrained=(0.5, 0.05)) == [False, True, True]
    assert _holds(base_rl=(0.02, 0.57)) == [True, False, True]


def test_rl_must_win_somewhere_and_lose_nowhere() -> None:
    assert _holds(prism_rl=(0.55, 0.62))[2] is False  # overlapping intervals are no gain
    assert _holds(prism_rl=(0.6, 0.53))[2] is False  # a clear loss on one family


def test_the_detail_says_the_numbers() -> None:
    claim = expected_claims(_stages(base=(0.0,), midtrained=(0.5,), base_rl=(0.0,), prism_rl=(0.6,)))[2]  # type: ignore[arg-type]
    assert claim["detail"] == "t0 50.0 % to 60.0 %"
