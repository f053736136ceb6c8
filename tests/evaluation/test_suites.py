"""What is asked: files of questions and their faults, splits, the study's benchmarks, rows of the Hub."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_models import write_rows

from prism_nemo.errors import InputError
from prism_nemo.evaluation.settings import EvaluateConfig, check_settings
from prism_nemo.evaluation.suites.build import REASONING, asked_of, build_suite, questions_hash
from prism_nemo.evaluation.suites.hub_rows import FORMS, HubSource, convert, fetch
from prism_nemo.evaluation.suites.question_file import QuestionFile, split_by_hash
from prism_nemo.rl.rewards.code import read_tests

SUM = {"question": "What is 2+5?", "answer": 7, "reward": "math"}
OPTIONS = ["Quito", "Lima", "La Paz", "Cusco"]


def _settings(**changes: Any) -> EvaluateConfig:
    return EvaluateConfig("model", "out", **changes)


def _sums(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"What is {i}+{i}?", "answer": 2 * i, "reward": "math", **more} for i in range(count)]


def test_sampling_is_the_studys() -> None:
    """arXiv 2603.17074: mathematics 64 samples at 0.6 and 0.95, code 3 at 0.7; GPQA's 3 follow from its decimals."""
    for name, benchmark in REASONING.items():
        s = benchmark.sampling
        expected = (64, 0.6, 0.95, 32768) if benchmark.domain == "math" else (3, 0.7, 1.0, 32768)
        assert (s.samples, s.temperature, s.top_p, s.max_new_tokens) == expected, name
    assert Counter(b.domain for b in REASONING.values()) == {"math": 3, "code": 2, "science": 1}
    assert REASONING["gpqa_diamond"].ours == ("temperature", "top_p", "max_new_tokens")


def test_a_benchmark_is_read_from_its_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "aime24.jsonl", [{"id": "a", "question": "1+1?", "answer": 2}])
    write_rows(tmp_path / "aime24.validation.jsonl", [{"id": "v", "question": "1+2?", "answer": 3}])
    suite = build_suite(_settings(data=str(tmp_path), tasks=("aime24",), samples=2))
    (task,) = suite.tasks
    assert [(q.id, q.split, q.problem.answer, q.problem.verifier) for q in task.questions] == [
        ("a", "test", "2", "math"),
        ("v", "validation", "3", "math"),
    ]
    assert (task.domain, task.sampling.samples, task.sampling.temperature) == ("math", 2, 0.6)
    assert suite.marks == ["aime24: 1 questions; the study's scores are over 30"]
    assert task.about["file"] == "aime24.jsonl"


def test_what_is_missing_is_named_with_its_place_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows(tmp_path / "aime24.jsonl", [{"question": "1+1?", "answer": 2}])
    with pytest.raises(InputError) as error:
        build_suite(_settings(data=str(tmp_path), tasks=("aime24", "gpqa_diamond")))
    message = str(error.value)
    assert f"{tmp_path / 'gpqa_diamond'}.jsonl" in message
    assert "'options'" in message
    assert "Idavidrein/gpqa" in message
    assert "--task aime24" in message
    with pytest.raises(InputError, match="--data is needed"):
        build_suite(_settings(tasks=("aime24",)))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([SUM, {"question": "What is 3?", "reward": "math"}], r":2: 'answer' must be a text or a number, not missing"),
        ([SUM, {"answer": 3, "reward": "math"}], r":2: needs 'question' or 'prompt'"),
        ([SUM, {"question": "What is 3?", "answer": 3}], r":2: 'reward' must be a text"),
        ([{**SUM, "id": 1}, {**SUM, "question": "Other?", "id": 1}], r":2: 'id' 1 is that of line 1 too"),
        ([SUM, SUM], r":2: asks the same question as .*:1; remove one of them, or give both an 'id'"),
        ([{**SUM, "split": "train"}], r":1: 'split' must be validation or test, not 'train'"),
        ([{**SUM, "split": "test"}, {**SUM, "question": "Other?"}], r"1 rows have a 'split' and 1 have none"),
        ([{**SUM, "reward": "choice", "options": ["7"]}], r":1: 'options' must be 2 to 10"),
        ([{**SUM, "reward": "code"}], r":1: .*give 'cases'"),
    ],
)
def test_a_faulty_row_is_refused_with_file_line_and_key(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    path = write_rows(tmp_path / "quiz.jsonl", rows)
    with pytest.raises(InputError, match=says) as error:
        build_suite(_settings(suite=str(path)))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ['{"question": "half', "[1]\n", '"text"\n', "\xff\n"])
def test_an_unreadable_line_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_bytes((json.dumps(SUM) + "\n" + text).encode("latin-1"))
    with pytest.raises(InputError, match=r"quiz\.jsonl:2: "):
        build_suite(_settings(suite=str(path)))


def test_files_that_share_a_question_are_refused(tmp_path: Path) -> None:
    test = write_rows(tmp_path / "quiz.jsonl", [{**SUM, "id": "a"}])
    for row, says in (
        ({**SUM, "id": "b"}, "is a question of"),
        ({**SUM, "id": "a", "question": "Other?"}, "is used in"),
        ({**SUM, "id": "c", "question": "Other?", "split": "test"}, "test split"),
    ):
        write_rows(tmp_path / "quiz.validation.jsonl", [row])
        with pytest.raises(InputError, match=says):
            build_suite(_settings(suite=str(test)))


def test_a_file_without_splits_has_a_fifth_for_validation_by_the_questions_text(tmp_path: Path) -> None:
    rows = _sums(1000)
    (task,) = build_suite(_settings(suite=str(write_rows(tmp_path / "quiz.jsonl", rows)))).tasks
    share = sum(q.split == "validation" for q in task.questions) / 1000
    assert share == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 1000) ** 0.5)  # four standard errors
    assert all(q.split == split_by_hash(q.problem.question) for q in task.questions)
    (reversed_task,) = build_suite(_settings(suite=str(write_rows(tmp_path / "r.jsonl", rows[::-1])))).tasks
    assert {q.id: q.split for q in reversed_task.questions} == {q.id: q.split for q in task.questions}
    write_rows(tmp_path / "quiz.validation.jsonl", [SUM | {"question": "Other?"}])
    (apart,) = build_suite(_settings(suite=str(tmp_path / "quiz.jsonl"))).tasks
    assert [q.split for q in apart.questions] == ["test"] * 1000 + ["validation"]


def test_splits_of_the_rows_go_before(tmp_path: Path) -> None:
    rows = _sums(3, split="validation") + [{**row, "question": row["question"] + "!"} for row in _sums(4, split="test")]
    path = tmp_path / "quiz.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (task,) = build_suite(_settings(suite=str(path))).tasks
    assert Counter(q.split for q in task.questions) == {"validation": 3, "test": 4}
    assert task.name == "quiz"


def test_some_of_the_questions_are_the_same_whatever_their_order(tmp_path: Path) -> None:
    rows = _sums(50, split="test")
    (task,) = build_suite(_settings(suite=str(write_rows(tmp_path / "a.jsonl", rows)))).tasks
    (other,) = build_suite(_settings(suite=str(write_rows(tmp_path / "b.jsonl", rows[::-1])))).tasks
    some, same = asked_of(task, "test", 7), asked_of(other, "test", 7)
    assert len(some) == 7
    assert {q.id for q in some} == {q.id for q in same}
    assert [q.id for q in some] != [q.id for q in task.questions[:7]]
    assert len(asked_of(task, "test", None)) == len(asked_of(task, "test", 999)) == 50


def test_the_right_letter_tells_nothing(tmp_path: Path) -> None:
    """Data sets have the right option first; shown, it stands anywhere, and it is still the right one."""
    rows = [
        {"question": f"Capital {i}?", "options": OPTIONS, "answer": 0, "reward": "choice", "split": "test"}
        for i in range(200)
    ]
    (task,) = build_suite(_settings(suite=str(write_rows(tmp_path / "quiz.jsonl", rows)))).tasks
    letters = Counter(q.problem.answer for q in task.questions)
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 50 + 4 * (200 * 0.25 * 0.75) ** 0.5
    for q in task.questions:
        assert q.problem.metadata["options"]["ABCD".index(q.problem.answer)] == "Quito"


def test_what_is_asked_and_what_is_right_decide_the_hash(tmp_path: Path) -> None:
    def hashed(row: dict[str, Any], name: str = "quiz") -> str:
        (task,) = build_suite(_settings(suite=str(write_rows(tmp_path / f"{name}.jsonl", [row])))).tasks
        return questions_hash(task.questions)

    base = {**SUM, "id": "a", "split": "test"}
    assert hashed(base) == hashed(base, "elsewhere") == hashed({**base, "note": "not read"})
    changed = [{"answer": 8}, {"question": "What?"}, {"id": "b"}, {"split": "validation"}, {"metadata": {"x": 1}}]
    hashes = {hashed({**base, **change}) for change in changed}
    assert len(hashes | {hashed(base)}) == len(changed) + 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"suite": "nothing"}, "--suite 'nothing' is unknown"),
        ({"suite": "none.jsonl"}, "there is no such file"),
        ({"tasks": ("aime23",)}, "'aime23' is unknown; the suite has aime24"),
        ({"suite": "pocket", "tasks": ("arithmetic",), "temperature": 0.0, "samples": 3}, "the same answer 3 times"),
        ({"suite": "pocket", "tasks": ("prompts:x.jsonl",)}, "give it as --suite x.jsonl"),
    ],
)
def test_a_suite_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build_suite(_settings(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"split": "train"}, "--split 'train'"),
        ({"questions": 0}, "--questions 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0"),
        ({"formats": ("think", "think")}, "--format: 'think' is named twice"),
        ({"suite": "retention", "samples": 3}, "--samples: says nothing to suite retention"),
        ({"suite": "retention", "formats": ("think",)}, "only chat may be asked for"),
        ({"suite": "quiz.jsonl", "data": "somewhere"}, "--data: says nothing to suite FILE.jsonl; it is for reasoning"),
        ({"suite": "pocket", "lengths": (4096,)}, "--length: says nothing to suite pocket; it is for longcontext"),
        ({"suite": "reasoning", "held_out": ("text",)}, "--held-out: says nothing to suite reasoning"),
    ],
)
def test_settings_are_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_settings(_settings(**changes))


def test_pocket_questions_keep_to_their_split() -> None:
    suite = build_suite(_settings(suite="pocket", questions=20))
    assert [task.name for task in suite.tasks] == ["arithmetic", "lists", "formulas"]
    for task in suite.tasks:
        splits = Counter(q.split for q in task.questions)
        assert splits == {"validation": 20, "test": 20}
        assert len({q.id for q in task.questions}) == 40
    again = build_suite(_settings(suite="pocket", questions=20))
    assert [questions_hash(t.questions) for t in suite.tasks] == [questions_hash(t.questions) for t in again.tasks]
    validation = build_suite(_settings(suite="pocket", questions=20, split="validation"))
    assert all(q.split == "validation" for task in validation.tasks for q in task.questions)


# Rows as the data sets had them.

_LCB = {
    "question_id": "q1",
    "question_content": "Add two numbers.",
    "platform": "leetcode",
    "difficulty": "easy",
    "contest_date": "2024-09-01T00:00:00",
    "starter_code": "class Solution:\n    def add(self, a, b):",
    "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
    "private_test_cases": base64.b64encode(
        zlib.compress(pickle.dumps(json.dumps([{"input": "[4]\n5", "output": "[9]", "testtype": "functional"}])))
    ).decode(),
    "metadata": json.dumps({"func_name": "add"}),
}
_CF = {
    "id": "1/A",
    "title": "Double",
    "description": "Double it.",
    "input_format": "A number.",
    "output_format": "Its double.",
    "interaction_format": None,
    "note": None,
    "examples": [{"input": "2", "output": "4"}],
    "official_tests": [{"input": "2", "output": "4"}, {"input": "5", "output": "10"}],
    "input_mode": "stdio",
    "rating": 800,
}
_GPQA = {
    "Record ID": "rec1",
    "Question": " Which? ",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "a",
    "Incorrect Answer 2": "b",
    "Incorrect Answer 3": "c",
}


def _converted(form: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    return list(convert(HubSource("owner/data", "test", form), [row], "owner/data@1"))


def test_hub_rows_become_rows_of_a_file(tmp_path: Path) -> None:
    made = {
        "aime24": _converted("aime", {"id": 60, "problem": "1+1?", "answer": 2, "solution": "so"}),
        "math500": _converted("math500", {"unique_id": "u", "problem": "1+2?", "answer": "3", "solution": "so"}),
        "gpqa_diamond": _converted("gpqa", _GPQA),
        "codeforces": _converted("codeforces", _CF),
        "livecodebench": _converted("livecodebench", _LCB),
    }
    problems = {}
    for name, rows in made.items():
        reward = REASONING[name].reward
        file = QuestionFile(write_rows(tmp_path / f"{name}.jsonl", rows), {"reward": reward})
        (problems[name],) = [q.problem for q in file.questions()]
        assert rows[0]["source"] == "owner/data@1"
    assert problems["aime24"].answer == "2"
    gpqa = problems["gpqa_diamond"]
    assert gpqa.metadata["options"]["ABCD".index(gpqa.answer)] == "right"
    assert read_tests(problems["codeforces"]).expected == ("4", "10")
    tests = read_tests(problems["livecodebench"])
    assert (tests.entry_point, tests.inputs, tests.expected) == ("Solution.add", ([1, 2], [[4], 5]), (3, [9]))
    assert "class Solution" in problems["livecodebench"].question


def test_hub_rows_that_are_not_the_studys_are_left_out() -> None:
    assert _converted("livecodebench", {**_LCB, "contest_date": "2024-07-31"}) == []
    assert _converted("livecodebench", {**_LCB, "contest_date": "2025-02-01"}) == []
    assert _converted("codeforces", {**_CF, "interaction_format": "Ask."}) == []
    assert set(FORMS) == {benchmark.hub.form for benchmark in REASONING.values()}


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("ran",)


def test_a_pickle_that_runs_something_is_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    evil = base64.b64encode(zlib.compress(pickle.dumps(_Evil()))).decode()
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
        _converted("livecodebench", {**_LCB, "private_test_cases": evil})
    assert capsys.readouterr().out == ""


def test_without_a_network_the_hub_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reason = fetch(REASONING["aime24"].hub, tmp_path / "aime24.jsonl")
    assert reason is not None
    assert "no network" in reason
    assert list(tmp_path.iterdir()) == []
