"""The adapter for reasoning-gym, for every task that it allows."""

from __future__ import annotations

import random

import pytest

from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.reasoning_gym import ALLOWED, ReasoningGymTask
from prism_nemo.rl.rewards.task import CLOSE, END, Problem, split_of, task_named

NUMERIC = ["chain_sum", "basic_arithmetic", "products", "gcd", "lcm", "simple_equations", "leg_counting"]


def _problems(name: str, count: int = 40) -> list[Problem]:
    rng = random.Random(name)
    task = task_named(f"reasoning_gym:{name}")
    return [task.draw(rng) for _ in range(count)]


def _reward(problem: Problem, answer: str) -> float:
    return task_named(problem.task).score(problem, f"some work{CLOSE}{answer}{END}").reward


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_the_own_answer_scores_one(name: str) -> None:
    """All of them: a task whose own answer is wrong can only teach that nothing helps."""
    for problem in _problems(name):
        assert _reward(problem, problem.answer) == 1.0, problem
        assert _reward(problem, f" {problem.answer}\n") == 1.0, problem


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_garbage_scores_zero_and_never_raises(name: str) -> None:
    for problem in _problems(name, 5):
        for answer in (
            "", " ", "garbage", "None", "nan", "inf", "-", ",", "[]", "{}", "null", "0x", "1e999", "[[1]]", "\x00",
            "🙂", "1 2 3", "'", '"', "['']", "A" * 5000, "9" * 5000, "[1", "true", "__import__('os').getcwd()",
        ):  # fmt: skip
            assert _reward(problem, answer) == 0.0, (problem, answer)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_wrong_but_plausible_answers_score_zero(name: str) -> None:
    """The scorers themselves often give 0.01 or more for these."""
    for problem in _problems(name):
        right = problem.answer
        wrong = [f"{right} {right}", f"the answer is {right}", right + "1", "1" + right, right[:-1], right + "?"]
        if name in NUMERIC:
            wrong += [str(int(right) + 1), str(int(right) - 1), str(-int(right)), str(int(right) * 10)]
        if name == "word_sorting":
            words = right.split(", ")
            wrong += [", ".join(reversed(words)), ", ".join(words[1:]), ", ".join([words[1], words[0], *words[2:]])]
        if name == "caesar_cipher":
            wrong += [right.lower(), right[::-1]]
        for answer in wrong:
            if answer.strip() != right and answer not in ("0", "-0") and len(set(answer)) > 0:
                assert _reward(problem, answer) == 0.0, (problem, answer)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_wrong_form_scores_zero(name: str) -> None:
    (problem,) = _problems(name, 1)
    task = task_named(problem.task)
    for response in ("", problem.answer, f"{problem.answer}{END}", f"x{CLOSE}{problem.answer}"):
        assert task.score(problem, response).reward == 0.0


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_draws_are_a_function_of_the_generator(name: str) -> None:
    """Also across the 256 problems that are made at a time, and whatever was drawn in between."""
    task = ReasoningGymTask(name)
    first = [task.draw(rng) for rng in [random.Random(3)] for _ in range(260)]
    other = random.Random(4)
    task.draw(other)
    again = [task.draw(rng) for rng in [random.Random(3)] for _ in range(260)]
    assert again == first
    assert len({p.question for p in first}) > 100
    assert all(p.task == f"reasoning_gym:{name}" for p in first)
    assert ReasoningGymTask(name).domain == ALLOWED[name]


@pytest.mark.parametrize("name", ["chain_sum", "word_sorting"])
def test_questions_have_splits_too(name: str) -> None:
    task = task_named(f"reasoning_gym:{name}")
    rng = random.Random(1)
    for split in ("train", "validation", "test"):
        assert {split_of(task.sample(rng, split).question) for _ in range(20)} == {split}


@pytest.mark.parametrize("name", ["rubiks_cube", "sudoku", "nonsense", ""])
def test_tasks_that_were_not_checked_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"not on the list of checked tasks; choose one of .*chain_sum"):
        task_named(f"reasoning_gym:{name}")
