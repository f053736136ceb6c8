"""lm-eval's own tasks with their questions from local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness_files import ABOUT, Knowing, likes, save_tokenizer_files, write_jsonl

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.store import read_results
from prism_nemo.evaluation.harness.run import HarnessSettings, run_harness


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer_files(tmp_path_factory.mktemp("tokenizer"))


def arc_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "question": f"number {n}",
            "choices": {"text": [f"{n} red", f"{n} fox", f"{n} old", f"{n} dog"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[n % 4],
        }
        for n in range(start, start + count)
    ]


def test_arc_from_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = arc_rows(4)
    write_jsonl(tmp_path / "data" / "arc_challenge" / "test.jsonl", rows)
    write_jsonl(tmp_path / "data" / "arc_challenge" / "train.jsonl", arc_rows(30, start=100))
    right = {row["choices"]["text"][n % 4] for n, row in enumerate(rows)}
    settings = HarnessSettings(("arc_challenge",), data=tmp_path / "data")
    found = run_harness(Knowing(tokenizer, likes(right)), settings, tmp_path / "out", ABOUT)
    score = found.tasks["arc_challenge"]
    assert (score.estimate, score.metric, score.domain, score.chance) == (1.0, "acc_norm", "science", 0.25)
    assert score.details["shots"] == 25
    assert score.details["leaderboard"]["score"] == 100
    results = read_results(tmp_path / "out" / "samples" / "arc_challenge.jsonl")
    assert [result.prompt.count("Question: number") for result in results] == [26] * 4
    assert {result.gold for result in results} == right


def test_winogrande_from_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its options stand in the context, and what is scored is the same for both."""
    rows = [
        {"sentence": f"The _ sees {n} birds.", "option1": "fox", "option2": "dog", "answer": "12"[n % 2]}
        for n in range(4)
    ]
    write_jsonl(tmp_path / "data" / "winogrande" / "validation.jsonl", rows)
    write_jsonl(tmp_path / "data" / "winogrande" / "train.jsonl", rows + [{**rows[0], "sentence": "A _ ran."}] * 9)
    model = Knowing(tokenizer, lambda context, continuation: context.endswith("The dog"))
    found = run_harness(model, HarnessSettings(("winogrande",), data=tmp_path / "data"), tmp_path / "out", ABOUT)
    assert found.tasks["winogrande"].estimate == 0.5
    results = read_results(tmp_path / "out" / "samples" / "winogrande.jsonl")
    assert [result.gold for result in results] == ["The fox", "The dog"] * 2
    assert [result.answers[0].read for result in results] == ["The dog"] * 4
    assert [result.correct for result in results] == [0, 1, 0, 1]


def test_gsm8k_from_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} and 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    for split, part in (("test", rows[:2]), ("train", rows[2:])):
        write_jsonl(tmp_path / "data" / "gsm8k" / f"{split}.jsonl", part)
    model = Knowing(tokenizer, writes=lambda prompt: " #### 1" if prompt.endswith("0 and 1?\nAnswer:") else " It is 2.")
    found = run_harness(model, HarnessSettings(("gsm8k",), data=tmp_path / "data"), tmp_path / "out", ABOUT)
    assert found.tasks["gsm8k"].estimate == 0.5  # the second has no ####
    results = read_results(tmp_path / "out" / "samples" / "gsm8k.jsonl")
    assert [result.metrics["exact_match/flexible-extract"] for result in results] == [1, 1]
    assert [result.answers[0].read for result in results] == ["1", "[invalid]"]


def test_gpqa_counts_each_question_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its three sets are nested; the leaderboard's score is over all of them, our estimate over the largest."""

    def row(n: int) -> dict[str, Any]:
        wrong = {f"Incorrect Answer {i}": f"{n} fox {i}" for i in (1, 2, 3)}
        return {"Question": f"number {n}", "Correct Answer": f"{n} red", **wrong}

    for part, count in (("diamond", 2), ("main", 3), ("extended", 6)):
        write_jsonl(tmp_path / "data" / f"leaderboard_gpqa_{part}" / "train.jsonl", [row(n) for n in range(count)])

    def knows(context: str, continuation: str) -> bool:
        question = context.rpartition("question:")[2]
        number = question.split()[1].removesuffix("Choices:")
        return int(number) < 2 and f"{continuation.strip()} {number} red" in question

    found = run_harness(
        Knowing(tokenizer, knows), HarnessSettings(("gpqa",), data=tmp_path / "data"), tmp_path / "out", ABOUT
    )
    score = found.tasks["gpqa"]
    results = read_results(tmp_path / "out" / "samples" / "gpqa.jsonl")
    assert score.questions == len(results) == 6
    knew = [result.correct for result in results]
    assert knew[:2] == [1, 1]
    means = score.details["subtasks"]
    raw = (2 * means["leaderboard_gpqa_diamond"] + 3 * means["leaderboard_gpqa_main"] + 6 * score.estimate) / 11
    assert score.details["leaderboard"]["score"] == pytest.approx(100 * (raw - 0.25) / 0.75)


def test_what_is_missing_is_named_with_where_to_put_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """There is no network here."""
    with pytest.raises(InputError) as caught:
        run_harness(Knowing(tokenizer), HarnessSettings(("gsm8k",)), tmp_path / "out", ABOUT)
    told = str(caught.value)
    assert "its questions (openai/gsm8k main) cannot be had" in told
    assert "Put the questions into DATA/gsm8k/test.jsonl and the examples into DATA/gsm8k/train.jsonl" in told
    write_jsonl(tmp_path / "data" / "gsm8k" / "test.jsonl", [{"question": "a", "answer": "#### 1"}])
    with pytest.raises(InputError, match=r"gsm8k/train\.jsonl: no such file"):
        run_harness(Knowing(tokenizer), HarnessSettings(("gsm8k",), data=tmp_path / "data"), tmp_path / "out", ABOUT)
    assert not (tmp_path / "out" / "evaluation.json").exists()
