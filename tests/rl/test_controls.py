"""Length shaping and control rewards."""

from __future__ import annotations

import pytest

from prism_nemo.rl.controls import CONTROLS, controlled, overlong_penalty

GROUP = 8
REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, *[1.0] * GROUP, *[0.0] * GROUP]
FORMED = [i % 3 == 0 for i in range(24)]
TEXTS = [(f"q{i // GROUP}", f"r{i}") for i in range(24)]


def _controlled(control: str, numbers: tuple[int, ...] = (0, 1, 2), rate: float = 0.5) -> list[float]:
    return controlled(control, REWARDS, FORMED, TEXTS, GROUP, numbers, rate)


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0)]
)
def test_length_is_punished_in_a_straight_line(length: int, penalty: float) -> None:
    """At most 100 tokens, the last 20 of which are a buffer."""
    assert overlong_penalty(length, 100, 20, 1.0) == pytest.approx(penalty)
    assert overlong_penalty(length, 100, 20, 0.4) == pytest.approx(0.4 * penalty)
    assert overlong_penalty(length, 100, 0, 1.0) == 0.0


def test_without_a_control_rewards_stay() -> None:
    assert _controlled("none") == REWARDS
    assert set(CONTROLS) == {"none", "random", "shuffled", "format_only", "frozen"}


def test_shuffled_keeps_what_each_group_got_and_nothing_else() -> None:
    found = _controlled("shuffled")
    for first in (0, 8, 16):
        assert sorted(found[first : first + 8]) == sorted(REWARDS[first : first + 8])
    # Two of eight: over many prompts each place gets a quarter of the rewards, whoever earned them.
    places = [0.0] * 8
    for number in range(400):
        for i, reward in enumerate(controlled("shuffled", REWARDS[:8], FORMED[:8], TEXTS[:8], 8, [number], 0.5)):
            places[i] += reward / 400
    assert all(0.25 - 4 * 0.0217 < p < 0.25 + 4 * 0.0217 for p in places)  # 4 standard errors


def test_random_has_its_rate_and_ignores_the_answer() -> None:
    found = [r for n in range(300) for r in controlled("random", [0.0] * 8, [False] * 8, TEXTS[:8], 8, [n], 0.25)]
    assert set(found) == {0.0, 1.0}
    assert sum(found) / len(found) == pytest.approx(0.25, abs=4 * 0.0088)
    assert controlled("random", REWARDS, FORMED, TEXTS, 8, (5, 6, 7), 0.5) == controlled(
        "random", [0.0] * 24, [True] * 24, TEXTS, 8, (5, 6, 7), 0.5
    )


def test_format_only_is_the_form() -> None:
    assert _controlled("format_only") == [float(formed) for formed in FORMED]


def test_frozen_is_a_fixed_function_of_question_and_response() -> None:
    first, later = _controlled("frozen"), _controlled("frozen", numbers=(90, 91, 92))
    assert first == later
    assert 0 < sum(first) < 24
    other = controlled("frozen", REWARDS, FORMED, [("q", "r")] * 24, GROUP, (0, 1, 2), 0.5)
    assert len(set(other)) == 1
    many = controlled("frozen", [0.0] * 4000, [True] * 4000, [("q", str(i)) for i in range(4000)], 8, range(500), 0.3)
    assert sum(many) / 4000 == pytest.approx(0.3, abs=4 * 0.0073)


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_a_group_gets_the_same_wherever_it_is_sampled(control: str) -> None:
    """Ranks have other groups beside it; only the prompt's number counts."""
    together = _controlled(control)
    for i in range(3):
        part = slice(i * GROUP, (i + 1) * GROUP)
        alone = controlled(control, REWARDS[part], FORMED[part], TEXTS[part], GROUP, [i], 0.5)
        assert alone == together[part]
    assert _controlled(control, numbers=(3, 4, 5)) != together
