"""Exact match, but for what does not change what a text says."""

from __future__ import annotations

import pickle

import pytest
from answer_forms import NOT_GIVEN, WRAPPINGS
from hypothesis import given
from hypothesis import strategies as st

from prism_nemo.rl.rewards.exact import ExactVerifier, normalised
from prism_nemo.rl.rewards.task import Problem


def score(expected: str, response: str) -> float:
    """What the verifier gives."""
    return ExactVerifier().verify(Problem("t", "?", "", expected), response)


@pytest.mark.parametrize(
    ("right", "wrong"), [("Paris", "London"), ("left, right", "right, left"), ("a b", "ab"), ("7", "8")]
)
def test_wrapped_answers(right: str, wrong: str) -> None:
    for wrapping in WRAPPINGS:
        assert score(right, wrapping.replace("@", right)) == 1.0, wrapping
        assert score(right, wrapping.replace("@", wrong)) == 0.0, wrapping
    for text in NOT_GIVEN:
        assert score(right, text.replace("@", right).replace("~", wrong)) == 0.0, text


@pytest.mark.parametrize(
    ("expected", "response"),
    [
        ("Paris", "PARIS"),
        ("Paris", '"Paris"'),
        ("Paris", r"\boxed{\text{Paris}}"),
        ("St. Louis", "The answer is St. Louis."),
        ("a b", " a\n b "),
        ("(1, 2)", "(1, 2)"),
        ("ﬁne", "fine"),
        ("What?", "What?"),
    ],
)
def test_the_same_text(expected: str, response: str) -> None:
    assert score(expected, response) == 1.0


@pytest.mark.parametrize(
    ("expected", "response"),
    [
        ("ab", "ba"),
        ("Paris", "Paris London"),
        ("Paris", "I like Paris"),
        ("Paris", ""),
        ("", ""),
        ("1.5", "15"),
        ("-1", "1"),
    ],
)
def test_another_text(expected: str, response: str) -> None:
    assert score(expected, response) == 0.0


@pytest.mark.parametrize("end", [".", "!", ". ", ".,;!"])
def test_a_long_tail_does_not_hold_up_the_trainer(end: str) -> None:
    """Taken off mark by mark, these would take minutes to hours: the square of their number."""
    assert normalised("x" + end * 1_000_000) == "x"
    assert normalised(end * 1_000_000) == end[0]
    assert score("x", "x" + end * 1_000_000) == 0.0


def test_long_answers_are_compared_whole() -> None:
    text = "word " * 3000
    assert score(text, text.upper()) == 1.0
    assert score(text, text + "more") == 0.0


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@given(st.text(min_size=1), st.text())
def test_a_text_equals_itself_and_what_normalises_to_it(text: str, other: str) -> None:
    if normalised(text):
        assert score(text, text) == 1.0
        assert score(text, other) == 0.0 or normalised(text) in normalised(other)


def test_it_stays_in_process_and_can_be_pickled() -> None:
    assert not ExactVerifier.isolated
    assert pickle.loads(pickle.dumps(ExactVerifier())).verify(Problem("t", "?", "", "x"), "x") == 1.0
