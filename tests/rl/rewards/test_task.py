"""Splits and scoring that every task shares."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import pytest

from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.task import Problem, Task, split_of, task_named


class Echo(Task):
    """Asks for a number and wants it back."""

    name, domain = "echo-for-tests", "math"

    def draw(self, rng: random.Random) -> Problem:
        """See `Task.draw`."""
        number = rng.randint(0, 9999)
        return Problem(self.name, f"say {number}", f"{number}", f"{number}")


PROBLEM = Problem("echo-for-tests", "say 42", "42", "42")


def test_splits_of_known_questions_never_change() -> None:
    # A question that moves to another split would leak test questions into training of an earlier checkpoint.
    known = [
        "47+38=?",
        "3+8-4=?",
        "a=[5,1,7];print(sum(a))",
        "say 42",
        "mass 12 kg, added 35 kg, total mass?",
        "10+12=?",
    ]
    assert [split_of(q) for q in known] == ["train", "test", "train", "train", "test", "train"]


def test_shares_of_the_splits() -> None:
    counts = Counter(split_of(f"question {i}") for i in range(20_000))
    assert counts["test"] / 20_000 == pytest.approx(0.2, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_samples_belong_to_the_split_that_was_asked_for(split: str) -> None:
    rng = random.Random(3)
    assert {split_of(Echo().sample(rng, split).question) for _ in range(200)} == {split}


def test_distinct_questions_are_distinct_and_the_same_each_time() -> None:
    first = Echo().distinct(300, "test", seed=1)
    assert len({p.question for p in first}) == 300
    assert first == Echo().distinct(300, "test", seed=1) != Echo().distinct(300, "test", seed=2)


@pytest.mark.parametrize(
    ("response", "reward", "well_formed"),
    [
        ("42</think>42<eos>", 1.0, True),
        ("</think>42<eos>", 1.0, True),
        ("42</think> 42 <eos>", 1.0, True),
        ("42</think>43<eos>", 0.0, True),
        ("42</think>42", 0.0, False),  # cut off before the end
        ("42<eos>", 0.0, False),  # no answer part
        ("42</think>42</think>42<eos>", 0.0, False),  # two answers
        ("<think>42</think>42<eos>", 0.0, False),
        ("", 0.0, False),
        ("42</think>42<eos></think>9<eos>", 1.0, True),  # what follows the end token does not count
    ],
)
def test_a_response_scores_by_form_and_answer(response: str, reward: float, well_formed: bool) -> None:
    score = Echo().score(PROBLEM, response)
    assert (score.reward, score.well_formed) == (reward, well_formed)


def test_problems_travel_between_processes() -> None:
    problem = Problem("t", "q", "w", "a", {"list": [1, 2]})
    assert pickle.loads(pickle.dumps(problem)).metadata == {"list": [1, 2]}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"'arithmetics' is unknown; known: arithmetic, "):
        task_named("arithmetics")
    with pytest.raises(InputError, match="split 'dev'"):
        Echo().sample(random.Random(0), "dev")
