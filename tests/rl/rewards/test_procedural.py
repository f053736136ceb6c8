"""Questions, worked answers and verdicts of the procedural tasks, and the split of questions."""

from __future__ import annotations

import ast
import operator
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.rl.rewards.task import CLOSE, END, OPEN, SPLITS, Problem, split_of, task_named

TASKS = ["arithmetic", "lists", "formulas"]
ANY = {"name": st.sampled_from(TASKS), "seed": st.integers(0, 2**32)}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def _value(text: str) -> Any:
    """What an expression of numbers, lists, max, sum and indices is worth; written anew, not the task's own code."""

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            arguments = [value(item) for item in node.args]
            return {"max": max, "sum": sum}[node.func.id](*arguments)
        if isinstance(node, ast.Subscript):
            items = value(node.value)
            if isinstance(node.slice, ast.Slice):
                assert ast.unparse(node.slice) == "::-1"
                return list(reversed(items))
            return items[value(node.slice)]
        raise AssertionError(ast.dump(node))

    return value(ast.parse(text, mode="eval").body)


def _truth(problem: Problem) -> str:
    """The right answer, from the question alone."""
    if problem.task == "arithmetic":
        return str(_value(problem.question.removesuffix("=?")))
    if problem.task == "lists":
        found = re.fullmatch(r"a=(\[.*?\]);print\((.*)\)", problem.question)
        assert found is not None
        return str(_value(re.sub(r"\ba\b", found[1], found[2]))).replace(" ", "")
    a, b = (int(number) for number in re.findall(r"(?<![a-z])\d+", problem.question))
    return str(a * b if re.search("force|voltage", problem.question) else a + b)


def _response(problem: Problem) -> str:
    """What a model that learned the document writes after the prompt."""
    assert problem.document.startswith(problem.prompt)
    return problem.document[len(problem.prompt) :] + END


def _draw(name: str, seed: int) -> Problem:
    return task_named(name).draw(random.Random(seed))


@given(**ANY)
@settings(max_examples=300, deadline=None)
def test_the_document_is_right_and_scores_one(name: str, seed: int) -> None:
    problem = _draw(name, seed)
    assert problem.task == name
    assert problem.answer == _truth(problem)
    score = task_named(name).score(problem, _response(problem))
    assert (score.reward, score.well_formed, score.answer) == (1.0, True, problem.answer)


@given(**ANY)
@settings(max_examples=300, deadline=None)
def test_every_step_of_the_work_is_true_and_leads_to_the_answer(name: str, seed: int) -> None:
    """Documents teach the steps: a wrong one would be learned as readily as a right one."""
    problem = _draw(name, seed)
    steps = problem.work.split(";")
    if name == "formulas":
        words, numbers = steps.pop(0).split("=")
        assert re.fullmatch(r"[a-z]+[+*][a-z]+", words)
        assert re.findall(r"\d+", numbers) == re.findall(r"(?<![a-z])\d+", problem.question)
        assert str(_value(numbers)) == problem.answer
    shown = re.search(r"\[.*?\]", problem.question)
    results = []
    for step in steps:
        left, right = step.split("=")
        if shown is not None:
            left = re.sub(r"\ba\b", shown[0], left)
        assert _value(left) == int(right), step
        results.append(int(right))
    columns = name == "formulas" or (name == "arithmetic" and re.fullmatch(r"\d\d\+\d\d=\?", problem.question))
    if columns:  # ones first, then tens with the carry: the answer is the tens, then the last digit of the ones
        assert f"{results[1]}{results[0] % 10}" == problem.answer
    elif "::-1" in problem.question:
        assert results == ast.literal_eval(problem.answer)
    else:
        assert str(results[-1]) == problem.answer


@given(**ANY, data=st.data())
@settings(max_examples=300, deadline=None)
def test_another_answer_scores_zero(name: str, seed: int, data: st.DataObject) -> None:
    """Digits changed, dropped, added or reordered, a unit, words around it, nothing."""
    problem = _draw(name, seed)
    right = problem.answer
    at = data.draw(st.integers(0, len(right) - 1))
    digit = data.draw(st.sampled_from("0123456789-,[]"))
    wrong = data.draw(
        st.sampled_from(
            [
                right[:at] + digit + right[at + 1 :],
                right[:at] + digit + right[at:],
                right[:at] + right[at + 1 :],
                right[::-1],
                right + "0",
                "-" + right,
                right + " kg",
                "the answer is " + right,
                right + "\n" + right,
                "",
                "0" + right,
            ]
        )
    )
    score = task_named(name).score(problem, f"{problem.work}{CLOSE}{wrong}{END}")
    assert score.reward == float(wrong.strip() == right)
    assert score.well_formed


@given(**ANY)
@settings(max_examples=100, deadline=None)
def test_another_form_scores_zero(name: str, seed: int) -> None:
    problem = _draw(name, seed)
    task, good = task_named(name), _response(problem)
    answer, work = problem.answer, problem.work
    for bad in (
        "",
        END,
        answer,
        answer + END,  # the thinking was never closed
        good.removesuffix(END),  # cut off before the end
        good.replace(CLOSE, ""),
        f"{work}{CLOSE}{CLOSE}{answer}{END}",
        f"{work}{CLOSE}{answer}{CLOSE}{answer}{END}",
        f"{work}{CLOSE}7{CLOSE}{answer}{END}",  # two tries
        f"{work}{OPEN}{work}{CLOSE}{answer}{END}",
        f"{END}{good}",  # the end comes first
        f"{work}{END}{CLOSE}{answer}{END}",
    ):
        score = task.score(problem, bad)
        assert (score.reward, score.well_formed) == (0.0, False), bad
    # What follows the end token was never written by a model that stops there.
    assert task.score(problem, good + "anything").reward == 1.0
    assert task.score(problem, f"{work}{CLOSE} {answer} \n{END}").reward == 1.0


@pytest.mark.parametrize("name", TASKS)
def test_split_sizes(name: str) -> None:
    """20 % test, 10 % validation, 70 % train, of distinct questions; three deviations of some thousands are 2 %."""
    rng = random.Random(1)
    questions = {task_named(name).draw(rng).question for _ in range(12_000)}
    shares = {split: sum(split_of(q) == split for q in questions) / len(questions) for split in SPLITS}
    assert shares == pytest.approx({"train": 0.70, "validation": 0.10, "test": 0.20}, abs=0.02)


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_training_never_sees_a_test_question(name: str) -> None:
    task = task_named(name)
    asked = {split: {p.question for p in task.distinct(250, split, seed=7)} for split in SPLITS}
    assert all(len(found) == 250 for found in asked.values())
    rng = random.Random(5)
    trained = {task.sample(rng, "train").question for _ in range(3000)} | asked["train"]
    assert not trained & (asked["test"] | asked["validation"])
    assert not asked["test"] & asked["validation"]


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_a_function_of_the_seed(name: str) -> None:
    task = task_named(name)
    first = task.distinct(50, "test", seed=7)
    assert task.distinct(50, "test", seed=7) == first
    assert task.distinct(20, "test", seed=7) == first[:20]  # asking for fewer asks for the same ones
    assert task.distinct(50, "test", seed=8) != first
    assert len({p.question for p in first}) == 50


def test_a_task_with_few_questions_gives_what_it_has() -> None:
    """Asked for a million questions, it stops."""
    problems = task_named("lists").distinct(1_000_000, "validation", seed=1)
    assert 400 < len(problems) < 1000
    assert len({p.question for p in problems}) == len(problems)
