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
        ("12", "\\boxed{1 2}", 0.0),
        ("12", "\\boxed{1~2}", 0.0),
        ("12", "x = 1 2", 0.0),
        ("25", "\\boxed{2\\quad5}", 0.0),
        ("123", "The answer is 1 2 3", 0.0),
        ("1000", "1 00 0", 0.0),
        ("12345", "1 2 345", 0.0),
        ("1.5", "1 . 5", 0.0),
        ("1.5", "1. 5", 0.0),
        ("1.55", "1.5 5", 0.0),
        ("$\\sqrt{12}$", "$\\sqrt{1 2}$", 0.0),
        ("1000000", "1 000 000", 1.0),
        ("1000000", "\\boxed{1\\,000\\,000}", 1.0),
        ("1 000 000", "1000000", 1.0),
        ("10000", "$10\\,000$", 1.0),
        ("10000", "1 0000", 0.0),
        ("1234.5", "1 234.5", 1.0),
        ("3.14159265", "3.141 592 65", 1.0),
        ("12345", "12 345", 1.0),
        ("1000", "1,000", 1.0),
        ("$x - 12$", "$x-12$", 1.0),
        ("$2x + 1$", "$2 x+1$", 1.0),
        ("1, 2", "1 , 2", 1.0),
        ("2 1/2", "2 1/2", 1.0),
        ("5", "5 apples short", 0.0),
        ("7", "7 dwarfs too many", 0.0),
        ("5", "5 apples", 1.0),
    ],
)
def test_what_is_wrong_earns_nothing(gold: str, answer: str, reward: float) -> None:
    assert MathVerifier().verify(Problem("t", "q", "", gold), answer) == reward
