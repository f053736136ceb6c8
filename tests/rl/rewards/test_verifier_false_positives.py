"""Wrong answers that once scored 1: a box that is taken back, a chain that contradicts itself, ends of an interval."""

from __future__ import annotations

import pytest

from prism_nemo.rl.rewards.mathematics import MathVerifier
from prism_nemo.rl.rewards.task import Problem


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        ("72", "\\boxed{72} is wrong", 0.0),
        ("72", "$\\boxed{72}$ is not the answer", 0.0),
        ("72", "\\boxed{72} is the answer", 1.0),
        ("72", "71=72", 0.0),
        ("72", "x=71=72", 0.0),
        ("72", "72=72", 1.0),
        ("72", "36+36=72", 1.0),
        ("$[1,5)$", "1,5", 0.0),
        ("$[1,5)$", "[1,5)", 1.0),
        ("1, 5", "$(1,5]$", 0.0),
    ],
)
def test_what_is_wrong_earns_nothing(gold: str, answer: str, reward: float) -> None:
    assert MathVerifier().verify(Problem("t", "q", "", gold), answer) == reward
