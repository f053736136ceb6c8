"""The sequence of prompts of a run."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from prism_nemo.errors import InputError
from prism_nemo.rl.prompts import PromptStream
from prism_nemo.rl.rewards.task import Problem, Task, split_of, task_named

TASKS = [task_named(name) for name in ("arithmetic", "lists", "formulas")]


class Listed(Task):
    """A fixed list of questions."""

    domain = "math"

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def problem(self, index: int) -> Problem:
        return Problem(self.name, f"{self.name} {index}", "", "a")

    def draw(self, rng: random.Random) -> Problem:
        raise NotImplementedError


def test_prompts_are_a_function_of_seed_and_number() -> None:
    """Whatever was read before, and in pieces of any size: a resumed run has read nothing."""
    whole = PromptStream(TASKS, seed=1).take(0, 60)
    assert PromptStream(TASKS, seed=1).take(35, 10) == whole[35:45]
    random.seed(0)
    stream = PromptStream(TASKS, seed=1)
    assert [p for first in range(0, 60, 7) for p in stream.take(first, 7)][:60] == whole
    assert PromptStream(TASKS, seed=2).take(0, 60) != whole
    assert len({p.question for p in whole}) > 50


def test_prompts_of_reasoning_gym_are_a_function_of_seed_and_number() -> None:
    """Its problems come in chunks that an object keeps; the chunk of one prompt must not leak into the next."""
    tasks = [task_named("reasoning_gym:chain_sum"), task_named("reasoning_gym:gcd")]
    stream = PromptStream(tasks, seed=1)
    first = stream.take(18, 6)
    stream.take(3, 7)
    assert stream.take(18, 6) == first
    assert len({p.question for p in stream.take(0, 20)}) >= 18


def test_prompts_are_of_the_training_split_and_shared_evenly() -> None:
    counts: Counter[str] = Counter()
    for step in range(60):
        problems = PromptStream(TASKS, seed=3).take(step * 7, 7)
        assert {split_of(p.question) for p in problems} == {"train"}
        counts.update(p.task for p in problems)
        assert max(counts.values()) - min(counts.get(t.name, 0) for t in TASKS) <= 1


def test_listed_prompts_come_once_an_epoch_in_another_order() -> None:
    stream = PromptStream([Listed("a", 11)], seed=5)
    epochs = [[p.question for p in stream.take(11 * k, 11)] for k in range(3)]
    assert [sorted(e) for e in epochs] == [sorted(f"a {i}" for i in range(11))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.epochs(16) == {"a": pytest.approx(16 / 11)}
    # Going back into an earlier epoch gives what it gave.
    assert [p.question for p in stream.take(0, 11)] == epochs[0]
    assert [p.question for p in PromptStream([Listed("a", 11)], seed=6).take(0, 11)] != epochs[0]


def test_files_of_the_same_size_are_not_shuffled_alike() -> None:
    stream = PromptStream([Listed("a", 9), Listed("b", 9)], seed=5)
    found = stream.take(0, 18)
    orders = [[p.question.split()[1] for p in found if p.task == name] for name in ("a", "b")]
    assert orders[0] != orders[1]


def test_shares_by_size() -> None:
    tasks = [Listed("a", 90), Listed("b", 10)]
    counts = Counter(p.task for p in PromptStream(tasks, seed=0, shares="size").take(0, 100))
    assert counts == {"a": 90, "b": 10}
    assert Counter(p.task for p in PromptStream(tasks, seed=0).take(0, 100)) == {"a": 50, "b": 50}
    with pytest.raises(InputError, match="task_shares: size needs prompt files, and 'arithmetic' makes"):
        PromptStream([*tasks, TASKS[0]], seed=0, shares="size")
