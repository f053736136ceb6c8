"""Verdicts: right answers in any place, and what is no answer, with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prism_nemo.config import RewardConfig
from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering import grading
from prism_nemo.evaluation.answering.grading import (
    CUT_OFF,
    EMPTY,
    NOTHING_AFTER,
    OPEN_FENCE,
    REPEATING,
    THINKING,
    Given,
    Grader,
    Written,
    check_verifiers,
    read_answer,
)
from prism_nemo.evaluation.question import EvaluationTask, Question
from prism_nemo.evaluation.result import Answer
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.evaluation.suites.pocket import pocket_tasks
from prism_nemo.rl.rewards.task import Problem

MATH = Problem("t", "What is 2+5?", "", "7", verifier="math")
EXACT = Problem("t", "Say yes.", "", "yes", verifier="exact")
CHOICE = Problem("t", "Capital?", "", "B", {"options": ["Quito", "Lima", "Cusco"]}, verifier="choice")
CODE = Problem("t", "Double.", "", "", {"cases": [["4", "8"], ["5", "10"]]}, verifier="code")
# bubblewrap is not on every machine that runs the tests; the sandbox has its own.
REWARDS = RewardConfig(gate="none", sandbox="process", time_limit=5.0)


def _task(*problems: Problem) -> EvaluationTask:
    return EvaluationTask("quiz", "math", [Question(f"q{i}", "test", p) for i, p in enumerate(problems)])


def _graded(
    problem: Problem,
    *texts: str,
    finished: bool = True,
    prompt: str = "Q: ?\nAnswer:",
    rewards: RewardConfig = REWARDS,
) -> list[Answer]:
    given = [Given(problem, prompt, Written(text, len(text), finished)) for text in texts]
    with Grader(_task(problem), rewards) as grader:
        return grader.grade(given)


@pytest.mark.parametrize(
    ("problem", "text", "correct", "read"),
    [
        (EXACT, "yes", 1.0, "yes"),
        (EXACT, "no", 0.0, "no"),
        (EXACT, "hm</think> Yes.", 1.0, "yes"),
        (EXACT, "<think>hm</think>yes", 1.0, "yes"),
        (CHOICE, "The answer is (B).", 1.0, "B"),
        (CHOICE, "\\boxed{b}", 1.0, "B"),
        (CHOICE, "The answer is A.", 0.0, "A"),
        (CHOICE, "A country has a capital and a flag", 0.0, None),  # an article is no choice
        (CHOICE, "A or B", 0.0, None),
        (CHOICE, "The answer is (E).", 0.0, None),
    ],
)
def test_answers_are_judged_as_in_training(problem: Problem, text: str, correct: float, read: str | None) -> None:
    (answer,) = _graded(problem, text)
    assert (answer.correct, answer.read, answer.failure, answer.text) == (correct, read, None, text)


@pytest.mark.parametrize(
    ("problem", "text", "finished", "opened", "failure"),
    [
        (EXACT, "", True, False, EMPTY),
        (EXACT, " \n", True, False, EMPTY),
        (EXACT, "", False, False, EMPTY),
        (EXACT, "yes", False, False, CUT_OFF),
        (EXACT, "yes, " * 900, False, False, REPEATING),
        (EXACT, "yes", True, True, THINKING),
        (EXACT, "<think>yes", True, False, THINKING),
        (EXACT, "yes</think>", True, True, NOTHING_AFTER),
        (CODE, "```python\nprint(2 * int(input()))\n", True, False, OPEN_FENCE),
        (CODE, "```python\nprint(1)\n```\n```python\nprint(2 * int(input()))", True, False, OPEN_FENCE),
    ],
)
def test_what_is_no_answer_is_wrong_and_says_why(
    problem: Problem, text: str, finished: bool, opened: bool, failure: str
) -> None:
    (answer,) = _graded(problem, text, finished=finished, prompt="Q: ?\n<think>" if opened else "Q: ?")
    assert (answer.correct, answer.read, answer.failure) == (0.0, None, failure)
    assert answer.text == text


def test_text_that_is_cut_off_is_not_called_a_loop() -> None:
    (answer,) = _graded(EXACT, " ".join(f"Step {i} gives {i * i}." for i in range(900)), finished=False)
    assert answer.failure == CUT_OFF


def test_programs_run_in_the_sandbox() -> None:
    right = "```python\nprint(2 * int(input()))\n```"
    wrong = "```python\nprint(8)\n```"  # right for the first case only
    found = _graded(CODE, right, wrong, "no program", f"<think>hm</think>{right}")
    assert [answer.correct for answer in found] == [1.0, 0.0, 0.0, 1.0]
    assert [answer.failure for answer in found] == [None] * 4
    assert found[0].read == found[3].read != found[1].read
    assert found[2].read is None


def test_a_verdict_that_cannot_be_had_is_wrong_and_says_why() -> None:
    rewards = replace(REWARDS, verifiers={"raises": "fake_models:Raises", "dies": "fake_models:Dies"})
    (raised,) = _graded(replace(EXACT, verifier="raises"), "yes", rewards=rewards)
    assert (raised.correct, raised.failure) == (0.0, "raised ZeroDivisionError")
    died = _graded(replace(EXACT, verifier="dies"), "yes", "die", "yes", "no", rewards=rewards)
    assert [answer.correct for answer in died] == [1.0, 0.0, 1.0, 0.0]
    assert [answer.failure for answer in died] == [None, "worker died", None, None]


def test_verdicts_keep_their_order_through_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_BATCH", 4)
    texts = ["yes", "", "no", "yes", "yes", "no", "", "yes", "no"]
    told: list[int] = []
    given = [Given(EXACT, "Q", Written(text, 3, True)) for text in texts]
    with Grader(_task(EXACT), REWARDS) as grader:
        found = grader.grade(given, told.append)
    assert [answer.text for answer in found] == texts
    assert [answer.correct for answer in found] == [float(text == "yes") for text in texts]
    assert told == [4, 8, 9]


def test_a_procedural_task_judges_its_own_form() -> None:
    (task,) = pocket_tasks(EvaluateConfig("m", "o", suite="pocket", tasks=("arithmetic",), questions=4))
    problem = task.questions[0].problem
    written = problem.document.removeprefix(problem.prompt)
    texts = [written, problem.answer, f"{written}</think>{problem.answer}", f"{problem.work}</think>wrong"]
    with Grader(task, REWARDS) as grader:
        found = grader.grade([Given(problem, problem.prompt, Written(text, 9, True)) for text in texts])
    assert [answer.correct for answer in found] == [1.0, 0.0, 0.0, 0.0]
    assert [answer.read for answer in found] == [problem.answer, None, None, "wrong"]


@pytest.mark.parametrize(
    ("problem", "answer", "read"),
    [
        (MATH, "So \\boxed{\\frac{1}{2}} it is.", "\\frac{1}{2}"),
        (MATH, "The answer is $ 7 $.", "7"),
        (MATH, "\\boxed{1} \\boxed{2}", "1, 2"),
        (MATH, "", None),
        (MATH, None, None),
        (EXACT, "**Yes**.", "yes"),
        (CHOICE, "It is not (A). The answer is (C).", "C"),
        (CODE, "print(1)", None),
    ],
)
def test_what_is_read_is_spelled_alike(problem: Problem, answer: str | None, read: str | None) -> None:
    assert read_answer(problem, answer) == read


def test_a_verifier_that_cannot_work_is_refused_before_anything() -> None:
    with pytest.raises(InputError, match="quiz: rewards: verifier 'none' is unknown"):
        check_verifiers(_task(replace(EXACT, verifier="none")), REWARDS)
    check_verifiers(_task(MATH, CODE), REWARDS)


def test_the_gate_of_training_plays_no_part() -> None:
    """A right answer without thinking is right, whatever the settings of the rewards say."""
    (answer,) = _graded(EXACT, "yes", rewards=replace(REWARDS, gate="think", stop_penalty=0.5, repetition_penalty=1.0))
    assert answer.correct == 1.0
