"""Prompts from files: what a row becomes, and what is refused with its file, line and key."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from tiny_training import character_tokenizer

from prism_nemo.errors import InputError, PrismError
from prism_nemo.rl.prompt_file import PromptFile, check_prompt_lengths
from prism_nemo.rl.prompts import Listed, PromptStream
from prism_nemo.rl.rewards.task import task_named

MATH = {"question": "What is 2+5?", "answer": 7, "reward": "math", "id": "m1", "domain": "math", "level": "easy"}
CHOICE = {"question": "Capital of Peru?", "options": ["Quito", "Lima", "La Paz"], "answer": 1, "reward": "choice"}
CODE = {"question": "Echo a line.", "reward": "code", "metadata": {"cases": [["a\n", "a\n"]]}, "domain": "code"}
VERBATIM = {"prompt": "Say yes.<think>", "answer": "yes", "reward": "exact"}
ROWS = [MATH, CHOICE, CODE, VERBATIM]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows, or lines as they are, to a file."""

    def call(*rows: Any, name: str = "p.jsonl") -> Path:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return call


def test_a_row_becomes_a_problem(write: Write) -> None:
    path = write(*ROWS)
    file = PromptFile(path)
    assert (len(file), file.name, file.domain) == (4, f"prompts:{path}", "prompts")
    assert isinstance(file, Listed)
    problems = [file.problem(i) for i in range(4)]
    assert {p.task for p in problems} == {file.name}
    assert [p.verifier for p in problems] == ["math", "choice", "code", "exact"]
    assert [p.domain for p in problems] == ["math", "choice", "code", "exact"]
    assert [p.answer for p in problems][::2] == ["7", ""]
    assert problems[0].prompt == "Q: What is 2+5?\n<think>"
    assert problems[3].prompt == "Say yes.<think>"
    assert problems[2].metadata == CODE["metadata"]
    assert [file.row(i) for i in range(4)] == ROWS
    assert file.verifiers == {"math": 1, "choice": 2, "code": 3, "exact": 4}
    assert file.domains == Counter(["math", "choice", "code", "exact"])


def test_task_named_builds_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """And builds it anew: a file may have changed since the name was last used."""
    path = write(MATH)
    assert len(task_named(f"prompts:{path}")) == 1  # type: ignore[arg-type]
    write(MATH, CHOICE)
    task = task_named(f"prompts:{path}", ["{question}!"])
    assert isinstance(task, PromptFile)
    assert [task.problem(i).prompt[-1] for i in range(2)] == ["!", "!"]
    monkeypatch.chdir(path.parent)
    assert task_named("prompts:p.jsonl").name == "prompts:p.jsonl"


def test_a_relative_path_is_that_of_the_start(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(MATH).parent)
    file = PromptFile(Path("p.jsonl"))
    monkeypatch.chdir("/")
    assert file.problem(0).answer == "7"


def test_options_are_shown_in_an_order_of_their_own(write: Write) -> None:
    """The letter is that of the right option as shown, and no letter is right more often than chance allows."""
    options = ["alpha", "beta", "gamma", "delta"]
    rows = [{**CHOICE, "question": f"Number {n}?", "options": options, "answer": 2} for n in range(400)]
    file = PromptFile(write(*rows))
    letters: Counter[str] = Counter()
    for n in range(400):
        problem = file.problem(n)
        lines = problem.prompt.split("\n")
        shown = [line.partition(". ")[2] for line in lines[1:5]]
        assert lines[0] == f"Q: Number {n}?"
        assert [line[0] for line in lines[1:5]] == list("ABCD")
        assert sorted(shown) == sorted(options)
        assert problem.metadata["options"] == shown
        assert shown["ABCD".index(problem.answer)] == "gamma"
        letters[problem.answer] += 1
    # 100 of 400 are expected, the standard deviation is sqrt(400 * 1/4 * 3/4) = 8.7; six of them.
    assert all(abs(letters[letter] - 100) < 52 for letter in "ABCD")
    # The same in another file, and whichever other rows there are.
    assert PromptFile(write(*rows[7:9], name="q.jsonl")).problem(0).metadata == file.problem(7).metadata


@pytest.mark.parametrize("answer", [1, "B", "b"])
def test_the_right_option_by_index_or_letter(write: Write, answer: Any) -> None:
    problem = PromptFile(write({**CHOICE, "answer": answer})).problem(0)
    assert problem.metadata["options"]["ABC".index(problem.answer)] == "Lima"


def test_a_verifier_of_the_users_gets_options_too(write: Write) -> None:
    problem = PromptFile(write({**CHOICE, "reward": "mine.rewards:Strict"})).problem(0)
    assert "Lima" in problem.prompt
    assert problem.metadata["options"]["ABC".index(problem.answer)] == "Lima"


def test_one_template_for_all(write: Write) -> None:
    """Braces of a template other than {question} are left alone, and those of a question are no template."""
    file = PromptFile(
        write({**MATH, "question": "What is {question}?"}, VERBATIM), ["<|user|>{question}\\boxed{}<think>"]
    )
    assert file.problem(0).prompt == "<|user|>What is {question}?\\boxed{}<think>"
    assert file.problem(1).prompt == "Say yes.<think>"


def test_templates_are_spread_over_questions(write: Write) -> None:
    rows = [{**MATH, "question": f"{n}+1?", "id": None} for n in range(300)]
    forms = ["A {question}", "B {question}", "C {question}"]
    file = PromptFile(write(*rows), forms)
    first = [file.problem(i).prompt for i in range(300)]
    assert {prompt[1:] for prompt in first} == {f" {n}+1?" for n in range(300)}
    counts = Counter(prompt[0] for prompt in first)
    # 100 are expected, the standard deviation is sqrt(300 * 1/3 * 2/3) = 8.2; six of them.
    assert all(abs(counts[form] - 100) < 49 for form in "ABC")
    # By the question, not by its place.
    backwards = PromptFile(write(*rows[::-1], name="b.jsonl"), forms)
    assert [backwards.problem(i).prompt for i in range(300)] == first[::-1]


@pytest.mark.parametrize("template", ["no place", "{Question}", ""])
def test_a_template_without_a_place_for_the_question(write: Write, template: str) -> None:
    with pytest.raises(InputError, match=r"prompt_templates: '.*' has no \{question\}"):
        PromptFile(write(MATH), ["{question}", template])


def test_compressed_files(write: Write, tmp_path: Path) -> None:
    plain = PromptFile(write(*ROWS))
    data = plain.path.read_bytes()
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(data))
    lines = data.split(b"\n", 2)
    frames = [zstandard.compress(part) for part in (lines[0] + b"\n" + lines[1], b"\n" + lines[2])]
    (tmp_path / "p.jsonl.zst").write_bytes(b"".join(frames))
    for name in ("p.jsonl.gz", "p.jsonl.zst"):
        file = PromptFile(tmp_path / name)
        assert [file.row(i) for i in range(len(file))] == ROWS
        assert [file.problem(i).prompt for i in range(4)] == [plain.problem(i).prompt for i in range(4)]


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_compressed_file_that_was_cut_short(tmp_path: Path, name: str, keep: float) -> None:
    data = "".join(json.dumps({**MATH, "id": n, "question": random.Random(n).random()}) for n in range(99)).encode()
    packed = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data)
    (tmp_path / name).write_bytes(packed[: int(len(packed) * keep)])
    with pytest.raises(InputError, match=f"{name}: is damaged .*copy it again"):
        PromptFile(tmp_path / name)


def test_lines_are_those_of_the_file(write: Write) -> None:
    """Blank lines, the line ends of Windows, separators inside of texts, and no line end at the end."""
    path = write(
        "", json.dumps(MATH) + "\r", "   ", json.dumps({**VERBATIM, "prompt": "a\u2028b"}, ensure_ascii=False), CODE
    )
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    file = PromptFile(path)
    assert [file.where(i) for i in range(3)] == [f"{path}:2", f"{path}:4", f"{path}:5"]
    assert file.row(0) == MATH
    assert file.problem(1).prompt == "a\u2028b"
    assert file.row(2) == CODE


def test_null_is_a_key_that_is_not_there(write: Write) -> None:
    """Tables that are written as JSON lines have every key in every row."""
    keys = ("question", "prompt", "answer", "reward", "options", "metadata", "domain", "id", "level")
    rows = [dict.fromkeys(keys) | row for row in [*ROWS, {**MATH, "id": None}]]
    bare, full = PromptFile(write(*ROWS)), PromptFile(write(*rows, name="full.jsonl"))
    assert [replace(full.problem(i), task=bare.name) for i in range(4)] == [bare.problem(i) for i in range(4)]
    assert [full.problem(i).metadata for i in range(4)] == [bare.problem(i).metadata for i in range(4)]


def _without(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_without(MATH, "question"), "needs 'question' or 'prompt'"),
        ({**MATH, "prompt": "p"}, "needs 'question' or 'prompt', one of them"),
        ({**MATH, "question": " "}, "'question' must be a text that is not empty, not ' '"),
        ({**MATH, "question": ["a"]}, "'question' must be a text"),
        ({**VERBATIM, "prompt": ""}, "'prompt' must be a text"),
        (_without(MATH, "reward"), "'reward' must be a text that is not empty, not missing"),
        ({**MATH, "reward": 1}, "'reward' must be a text"),
        (_without(MATH, "answer"), "'answer' must be a text or a number, not missing"),
        ({**MATH, "answer": True}, "'answer' must be a text or a number, not True"),
        ({**MATH, "answer": ""}, "'answer' must be a text or a number, not ''"),
        ({**MATH, "answer": float("nan")}, "'answer' must be a text or a number, not nan"),
        ({**MATH, "answer": ["7"]}, "'answer' must be a text or a number, not .'7'."),
        ({**MATH, "answer": {"x" * 100: 1}}, "'answer' must be a text or a number, not .'x{55}[.]{3}$"),
        ({**MATH, "domain": 3}, "'domain' must be a text"),
        ({**MATH, "metadata": [1]}, "'metadata' must be an object, not .1."),
        ({**MATH, "options": ["7", "8"]}, "'options' are for reward choice, and this row's is math"),
        (_without(CHOICE, "options"), "'options' must be a list of texts"),
        ({**CHOICE, "options": "Lima"}, "'options' must be a list of texts"),
        ({**CHOICE, "options": ["Lima", 3]}, "'options' must be a list of texts"),
        ({**CHOICE, "options": ["Lima", " "]}, "'options' must be a list of texts"),
        ({**CHOICE, "options": ["Lima"], "answer": 0}, "'options' must be 2 to 10 different texts"),
        ({**CHOICE, "options": [str(n) for n in range(11)]}, "'options' must be 2 to 10 different texts"),
        ({**CHOICE, "options": ["Lima", "Lima"]}, "'options' must be 2 to 10 different texts"),
        ({**CHOICE, "answer": 3}, "'answer' must be the index .from 0. or the letter of one of the 3 options, not 3"),
        ({**CHOICE, "answer": -1}, "'answer' must be the index"),
        ({**CHOICE, "answer": "D"}, "'answer' must be the index .*not 'D'"),
        ({**CHOICE, "answer": "Lima"}, "'answer' must be the index .*not 'Lima'"),
        ({**CHOICE, "answer": True}, "'answer' must be the index .*not True"),
        (_without(CHOICE, "answer"), "'answer' must be the index .*not missing"),
        ({**_without(CHOICE, "question"), "prompt": "p"}, "'prompt' is shown word for word, and 'options' are not"),
        (_without(CODE, "metadata"), "tests of the problem 'Echo a line.*there are none"),
        ({**CODE, "metadata": {"cases": [["a"]]}}, "'cases' must be a list of pairs"),
        ("[1]", "every line must be one JSON object, not list"),
        ('{"question": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"question": "\\ud83d", "answer": 1, "reward": "math"}', "not JSON.*surrogates"),
        ('{"answer": ' + "9" * 5000 + "}", "not JSON.*digits"),
    ],
)
def test_a_row_that_cannot_be_used(write: Write, row: Any, message: str) -> None:
    """Named with file and line; the rows before it are good."""
    path = write({**MATH, "id": "x"}, "", row)
    with pytest.raises(InputError, match=f"(?s)^{path}:3: .*{message}"):
        PromptFile(path)


def test_large_integers_are_answers(write: Write) -> None:
    assert PromptFile(write({**MATH, "answer": 10**400})).problem(0).answer == "1" + "0" * 400


def test_a_pair_of_surrogates_is_a_character(write: Write) -> None:
    row = '{"question": "\\ud83d\\ude00", "answer": 1, "reward": "math"}'
    assert PromptFile(write(row)).problem(0).question == "\U0001f600"


@pytest.mark.parametrize(("first", "second"), [("a", "a"), (5, 5), (5, "5")])
def test_ids_are_used_once(write: Write, first: Any, second: Any) -> None:
    path = write({**MATH, "id": first}, MATH, {**MATH, "id": second})
    with pytest.raises(InputError, match=f"{path}:3: 'id' {second!r} is that of line 1 too"):
        PromptFile(path)


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.jsonl: cannot be read: No such file"):
        task_named(f"prompts:{tmp_path / 'none.jsonl'}")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        PromptFile(tmp_path)
    for text in ("", "\n \n"):
        with pytest.raises(InputError, match=r"p.jsonl: holds no prompts; write one JSON object per line"):
            PromptFile(write(text))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(MATH).encode() + b'\n{"question": "\xe9"}\n')
    with pytest.raises(InputError, match=r"latin.jsonl:2: not JSON: .*utf-8"):
        PromptFile(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("kind", ["shorter", "other", "gone"])
def test_a_file_that_changes_under_a_run(write: Write, kind: str) -> None:
    """Never half a row, or another row with this one's number."""
    rows = [{**MATH, "id": n} for n in range(20)]
    file = PromptFile(write(*rows))
    assert file.row(19) == rows[19]
    if kind == "shorter":
        write(*rows[:3])
    elif kind == "other":
        write(*rows[:19], {**rows[19], "answer": 8})
    else:
        file.path.unlink()
    with pytest.raises(PrismError, match=r"p.jsonl:20: the file was (changed|removed) after it was read; start again"):
        file.row(19)
    if kind == "other":
        assert file.row(2) == rows[2]


def test_a_file_is_one_split(write: Write) -> None:
    rows = [{**MATH, "question": f"{n}?", "id": None} for n in range(40)]
    file = PromptFile(write(*rows, rows[5]))
    for split in ("train", "test"):
        found = file.distinct(100, split, seed=3)
        assert sorted(p.question for p in found) == sorted(row["question"] for row in rows)
    assert [p.question for p in found] != [row["question"] for row in rows]
    assert file.distinct(7, "test", seed=3) == found[:7]
    assert file.distinct(7, "test", seed=4) != found[:7]
    drawn = {file.sample(random.Random(n), "train").question for n in range(300)}
    assert len(drawn) > 30


def test_a_run_draws_each_prompt_once_an_epoch(write: Write) -> None:
    rows = [{**MATH, "question": f"{n}?", "id": None} for n in range(12)]
    stream = PromptStream([PromptFile(write(*rows))], seed=1)
    epochs = [[p.question for p in stream.take(12 * k, 12)] for k in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(row["question"] for row in rows)] * 2
    assert epochs[0] != epochs[1]


def test_prompts_without_room_for_a_response(write: Write, tmp_path: Path) -> None:
    """A character is a token here: ``Q: `` and ``\\n<think>`` are five tokens beside the question."""
    tokenizer = character_tokenizer(tmp_path / "tokenizer")
    rows = [{**MATH, "question": "x" * n, "id": n} for n in (20, 31, 45, 44)]
    tasks = [task_named("arithmetic"), PromptFile(write("", *rows))]
    check_prompt_lengths(tasks, tokenizer, 50)
    message = r"p.jsonl: 2 of 4 prompts are longer than the 36 tokens .*the longest has 50 tokens \(.*p.jsonl:4\)"
    with pytest.raises(InputError, match=message + r"\. Lower rollout.max_new_tokens"):
        check_prompt_lengths(tasks, tokenizer, 36)
    with pytest.raises(InputError, match=r"3 of 4 prompts .*Lower --max-new-tokens"):
        check_prompt_lengths(tasks, tokenizer, 35, "--max-new-tokens")
    # One is too long, and most are so short that they need no look.
    many = [{**MATH, "question": "x", "id": None}] * 3000 + [{**MATH, "question": "x" * 396}]
    check_prompt_lengths([PromptFile(write(*many))], tokenizer, 401)
    with pytest.raises(InputError, match=r"1 of 3001 prompts .*p.jsonl:3001"):
        check_prompt_lengths([PromptFile(write(*many))], tokenizer, 400)
