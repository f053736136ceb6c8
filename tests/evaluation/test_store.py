"""What is on disk after kills, faults and other people's runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.answering.answers import AnswerLog, Cache, digest
from prism_nemo.evaluation.answering.grading import Written
from prism_nemo.evaluation.answering.store import (
    Store,
    differences,
    read_evaluation,
    read_results,
    write_evaluation,
    write_results,
)
from prism_nemo.evaluation.result import Answer, Evaluation, QuestionResult, TaskScore

ANSWERS = {
    ("q1", 0): Written("one\nline", 4, True),
    ("q1", 1): Written("", 0, False),
    ("q2", 0): Written("ünïcode \u2028 \"'", 7, True),
}


def _log(path: Path, key: str = "k", said: list[str] | None = None) -> AnswerLog:
    return AnswerLog(path, key, ([] if said is None else said).append)


def test_answers_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "answers/task.jsonl"
    log = _log(path)
    assert log.found == {}
    log.append({("q1", 0): ANSWERS["q1", 0]})
    log.append({place: ANSWERS[place] for place in (("q1", 1), ("q2", 0))})
    assert _log(path).found == ANSWERS == log.found


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_a_kill_cut_short_is_asked_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "task.jsonl"
    _log(path).append(ANSWERS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    said: list[str] = []
    log = _log(path, said=said)
    kept = {place: answer for place, answer in ANSWERS.items() if place != ("q2", 0)}
    # Without its line break alone, the last line is whole.
    assert log.found == (ANSWERS if cut == 1 else kept)
    assert bool(said) == (cut > 1)
    log.append({("q2", 0): ANSWERS["q2", 0]})
    assert _log(path).found == ANSWERS
    assert path.read_bytes().count(b"\n") == 4 + (cut == 1)


@pytest.mark.parametrize("fault", [b"\0" * 40, b"{}", b'{"id": "q1"}', b"[]", b'{"id": 1, "sample": "x"}'])
def test_a_damaged_line_costs_its_answer_only(tmp_path: Path, fault: bytes) -> None:
    path = tmp_path / "task.jsonl"
    _log(path).append(ANSWERS)
    lines = path.read_bytes().split(b"\n")
    lines[2] = fault
    path.write_bytes(b"\n".join(lines))
    said: list[str] = []
    assert _log(path, said=said).found == {place: ANSWERS[place] for place in (("q1", 0), ("q2", 0))}
    assert "1 answers could not be read" in said[0]
    assert _log(path, said=said).found.keys() == {("q1", 0), ("q2", 0)}
    assert len(said) == 1


def test_answers_to_something_else_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    _log(path).append(ANSWERS)
    assert _log(path, "other").found == {}
    assert _log(path, "k").found == {}  # the file is that of the other key now


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = _log(tmp_path / "task.jsonl")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PrismError, match=r"task\.jsonl: cannot be written \(No space left.*run the same command"):
        log.append(ANSWERS)


def test_the_cache_gives_what_was_put_in(tmp_path: Path) -> None:
    cache, wanted = Cache(tmp_path / "cache"), list(ANSWERS)
    done = _log(tmp_path / "a.jsonl")
    assert not cache.take(done, wanted)
    done.append(ANSWERS)
    cache.put(done)
    fresh = _log(tmp_path / "b.jsonl")
    assert cache.take(fresh, wanted)
    assert fresh.found == ANSWERS == _log(tmp_path / "b.jsonl").found
    assert not cache.take(_log(tmp_path / "c.jsonl", "other"), wanted)
    assert not cache.take(_log(tmp_path / "d.jsonl"), [*wanted, ("q3", 0)])
    assert not Cache(None).take(_log(tmp_path / "e.jsonl"), wanted)
    assert not cache.take(done, wanted)  # it has answers of its own


@pytest.mark.parametrize("keep", [0, 1, 40])
def test_a_damaged_entry_of_the_cache_is_none(tmp_path: Path, keep: int) -> None:
    cache = Cache(tmp_path / "cache")
    done = _log(tmp_path / "a.jsonl")
    done.append(ANSWERS)
    cache.put(done)
    (entry,) = (tmp_path / "cache").rglob("*.zst")
    entry.write_bytes(entry.read_bytes()[:keep])
    fresh = _log(tmp_path / "b.jsonl")
    assert not cache.take(fresh, list(ANSWERS))
    assert fresh.found == {}


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = [
        QuestionResult(
            "q1", "test", "Q: ?", "7", [Answer("7", 1, True, "7", 1.0), Answer("", 0, False, None, 0.0, "empty")]
        ),
        QuestionResult("q2", "validation", "Q\n", "é", [Answer("x", 1, True, None, 0.5)], [-1.5], {"acc_norm": 1.0}),
    ]
    write_results(tmp_path / "samples/quiz.jsonl", results)
    assert read_results(tmp_path / "samples/quiz.jsonl") == results
    assert results[0].correct == 0.5
    with (tmp_path / "samples/quiz.jsonl").open("a") as file:
        file.write('{"id": "q3"}\n')
    with pytest.raises(InputError, match=r"quiz\.jsonl:3: is not a question"):
        read_results(tmp_path / "samples/quiz.jsonl")
    score = TaskScore("math", "pass@1", 0.5, 0.1, 0.9, 2, details={"failures": {"empty": 1}})
    evaluation = Evaluation("quiz", "test", {"hash": "h"}, {"seed": 1}, {"quiz": score}, {}, ["a mark"])
    write_evaluation(tmp_path, evaluation)
    assert read_evaluation(tmp_path) == evaluation


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation\.json: cannot be read"):
        read_evaluation(tmp_path)
    for text, says in (
        ("{", "is not an evaluation"),
        ("[]", "is not an evaluation"),
        ('{"format": 9}', "has format 9"),
    ):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(InputError, match=says):
            read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(InputError, match="was not finished; run the same"):
        read_evaluation(tmp_path)


def test_a_folder_is_one_evaluations(tmp_path: Path) -> None:
    identity: dict[str, Any] = {"seed": 1, "tasks": {"quiz": {"samples": 2}}, "formats": ["think"]}
    with Store(tmp_path, identity, {}):
        pass
    with Store(tmp_path, identity, {"batch": 2}):
        pass
    with pytest.raises(InputError, match=r"another tasks\.quiz\.samples, bos; use another folder"):
        Store(tmp_path, {**identity, "tasks": {"quiz": {"samples": 3}}, "bos": None, "seed": 1} | {"bos": True}, {})
    with Store(tmp_path, identity, {}):  # the refusal left it unlocked and as it was
        assert json.loads((tmp_path / "settings.json").read_text())["identity"] == identity
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(InputError, match=r"settings\.json: is damaged"):
        Store(tmp_path, identity, {})
    (tmp_path / "settings.json").unlink()
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(InputError, match="evaluation of another kind"):
        Store(tmp_path, identity, {})


def test_two_evaluations_do_not_write_to_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from prism_nemo.evaluation.answering.store import locked\n"
        "lock = locked(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="another evaluation is running in it"):
            Store(tmp_path, {}, {})
    finally:
        other.kill()
        other.wait()
    with Store(tmp_path, {}, {}):  # its end, however it comes, is the end of its lock
        pass


def test_differences_are_named_to_the_key() -> None:
    assert differences({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 3}) == ["a.c", "d", "e"]
    assert differences({"a": {}}, {"a": {}}) == []
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
