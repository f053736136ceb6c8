"""Suite `retention` through lm-eval: every question once, judged as lm-eval judges it, and nothing lost on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from harness_files import (
    ABOUT,
    Knowing,
    choice_rows,
    likes,
    save_model,
    save_tokenizer_files,
    write_choice,
    write_tasks,
    write_writing,
)
from harness_workers import on_two_ranks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.answering.store import read_evaluation, read_results
from prism_nemo.evaluation.harness.model import PrismNemoLM
from prism_nemo.evaluation.harness.run import HarnessSettings, run_harness
from prism_nemo.evaluation.harness.tasks.loading import choose_benchmarks, load_leaf, task_manager
from prism_nemo.evaluation.harness.tasks.samples import question_results
from prism_nemo.evaluation.result import Answer
from prism_nemo.runtime.launch import launch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer_files(tmp_path_factory.mktemp("tokenizer"))


def gold_of(rows: list[dict[str, Any]]) -> set[str]:
    return {row["choices"][row["answer"]] for row in rows}


def unlike_rows(count: int) -> list[dict[str, Any]]:
    """Questions whose right answers are wrong nowhere, and longer than the wrong ones."""
    return [
        {
            "question": f"number {n}",
            "choices": [f"{n} red slow dog" if i == n % 4 else f"{n} fox {i}" for i in range(4)],
            "answer": n % 4,
        }
        for n in range(count)
    ]


def test_scores_are_lm_evals_own(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions, metrics and means as `simple_evaluate`, question by question."""
    rows = choice_rows(15)
    write_choice(tmp_path / "tasks", "choices", rows, shots=2)
    write_writing(tmp_path / "tasks", "writing", [{"question": f"{w} x", "answer": w} for w in ("red", "fox", "dog")])

    def model() -> Knowing:
        return Knowing(tokenizer, likes(gold_of(rows[::2])), lambda prompt: " red\nand" if "red" in prompt else "dog")

    settings = HarnessSettings(("choices", "writing"), folder=tmp_path / "tasks")
    found = run_harness(model(), settings, tmp_path / "out", ABOUT)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists packages for seconds
    theirs = simple_evaluate(
        PrismNemoLM(checkpoint=model()), tasks=["choices", "writing"], task_manager=manager, bootstrap_iters=0
    )
    assert theirs is not None
    for name, metric in (("choices", "acc"), ("writing", "exact_match")):
        assert found.tasks[name].estimate == theirs["results"][name][f"{metric},none"]
        results = read_results(tmp_path / "out" / "samples" / f"{name}.jsonl")
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(results) == len(samples) == found.tasks[name].questions
        for result, sample in zip(results, samples, strict=True):
            assert result.correct == sample[metric]
            assert result.prompt == sample["arguments"][0][0]
            assert result.id == f"{name}/{sample['doc_hash'][:16]}"
    assert 0 < found.tasks["choices"].estimate < 1
    assert 0 < found.tasks["writing"].estimate < 1


def test_what_stands_in_a_result(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = unlike_rows(5)
    write_choice(tmp_path / "tasks", "choices", rows)
    write_writing(
        tmp_path / "tasks", "writing", [{"question": "red", "answer": "fox"}, {"question": "a", "answer": "b"}]
    )
    model = Knowing(tokenizer, likes(gold_of(rows[:3])), lambda prompt: "fox\n dog" if "red" in prompt else "  ")
    settings = HarnessSettings(("choices", "writing"), folder=tmp_path / "tasks")
    found = run_harness(model, settings, tmp_path / "out", ABOUT)
    assert read_evaluation(tmp_path / "out") == found
    score = found.tasks["choices"]
    results = read_results(tmp_path / "out" / "samples" / "choices.jsonl")
    assert score.estimate == sum(result.correct for result in results) / 5 == 0.6
    assert [result.gold for result in results] == [row["choices"][row["answer"]] for row in rows]
    assert results[0].answers == [Answer("", 0, True, "0 red slow dog", 1.0)]
    assert len(results[0].logprobs) == 4
    assert max(results[0].logprobs) == results[0].logprobs[0] == -0.01
    assert results[0].metrics == {"acc_norm": 1.0}
    assert (score.metric, score.samples, score.chance) == ("acc", 1, 0.25)
    assert score.low < score.estimate < score.high
    right, empty = read_results(tmp_path / "out" / "samples" / "writing.jsonl")
    assert right.answers == [Answer("fox", len(tokenizer.encode("fox")), True, "fox", 1.0)]
    assert right.gold == "fox"
    assert empty.answers[0].failure == "nothing was answered"
    assert found.model == ABOUT
    assert found.settings["lm_eval"] == "0.4.13"
    assert found.averages == {}


def test_an_answer_that_was_cut_off_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_writing(tmp_path / "tasks", "writing", [{"question": "red", "answer": "fox"}])
    model = Knowing(tokenizer, writes=lambda prompt: " slow dog" * 20)
    settings = HarnessSettings(("writing",), folder=tmp_path / "tasks")
    run_harness(model, settings, tmp_path / "out", ABOUT)
    (result,) = read_results(tmp_path / "out" / "samples" / "writing.jsonl")
    assert not result.answers[0].finished
    assert result.answers[0].failure == "cut off"


def test_the_same_question_twice_counts_twice(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = unlike_rows(3)
    write_choice(tmp_path / "tasks", "choices", [*rows, rows[1], rows[1]])
    settings = HarnessSettings(("choices",), folder=tmp_path / "tasks")
    found = run_harness(Knowing(tokenizer, likes(gold_of(rows[1:2]))), settings, tmp_path / "out", ABOUT)
    results = read_results(tmp_path / "out" / "samples" / "choices.jsonl")
    assert found.tasks["choices"].questions == len({result.id for result in results}) == 5
    assert [result.id.partition("#")[2] for result in results] == ["", "", "", "2", "3"]


SHUFFLING = """
process_docs: !function shuffling.shuffled
"""
SHUFFLE = """
import random


def shuffled(dataset):
    def one(row):
        order = list(range(4))
        random.shuffle(order)
        choices = [row["choices"][i] for i in order]
        return {"choices": choices, "answer": order.index(row["answer"])}

    return dataset.map(one)
"""


def test_options_that_a_task_shuffles_are_judged_as_they_were_asked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """lm-eval reads such questions again to judge the answers; if they were shuffled again, right would be wrong."""
    rows = unlike_rows(20)
    write_choice(tmp_path / "tasks", "choices", rows, more=SHUFFLING)
    (tmp_path / "tasks" / "shuffling.py").write_text(SHUFFLE)
    settings = HarnessSettings(("choices",), folder=tmp_path / "tasks")
    found = [run_harness(Knowing(tokenizer, likes(gold_of(rows))), settings, tmp_path / "a", ABOUT)]
    datasets.disable_caching()  # lm-eval alone would now shuffle between asking and judging
    try:
        found.append(run_harness(Knowing(tokenizer, likes(gold_of(rows))), settings, tmp_path / "b", ABOUT))
    finally:
        datasets.enable_caching()
    first, second = (read_results(tmp_path / out / "samples" / "choices.jsonl") for out in ("a", "b"))
    assert [one.tasks["choices"].estimate for one in found] == [1, 1]
    assert first == second
    assert [result.gold for result in first] == [f"{n} red slow dog" for n in range(20)]
    assert all(result.answers[0].read == result.gold for result in first)
    assert {result.logprobs.index(max(result.logprobs)) for result in first} == {0, 1, 2, 3}


class _Killed(BaseException):
    """Stands for a kill."""


def test_what_was_done_is_not_done_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = ("one", "two")
    for name in names:
        write_choice(tmp_path / "tasks", name, unlike_rows(4 if name == "one" else 6))
    settings = HarnessSettings(names, folder=tmp_path / "tasks")
    said: list[str] = []

    class Dying(Knowing):
        def score(self, continuations: Any) -> Any:
            if self.scored:
                raise _Killed
            return super().score(continuations)

    with pytest.raises(_Killed):
        run_harness(Dying(tokenizer), settings, tmp_path / "out", ABOUT, said.append)
    assert any("two" in line for line in said)
    with pytest.raises(InputError, match="was not finished"):
        read_evaluation(tmp_path / "out")
    going_on, whole = Knowing(tokenizer), Knowing(tokenizer)
    found = run_harness(going_on, settings, tmp_path / "out", ABOUT)
    assert len(going_on.scored) == 4 * 6
    assert found == run_harness(whole, settings, tmp_path / "other", ABOUT)
    assert len(whole.scored) == 4 * (4 + 6)
    again = Knowing(tokenizer)
    assert run_harness(again, settings, tmp_path / "out", ABOUT) == found
    assert again.scored == []
    # Other questions under the same name are asked.
    write_choice(tmp_path / "tasks", "one", unlike_rows(5))
    run_harness(again, settings, tmp_path / "out", ABOUT)
    assert len(again.scored) == 4 * 5


def test_a_folder_of_another_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_choice(tmp_path / "tasks", "one", unlike_rows(2))
    settings = HarnessSettings(("one",), folder=tmp_path / "tasks")
    run_harness(Knowing(tokenizer), settings, tmp_path / "out", ABOUT)
    with pytest.raises(InputError, match="holds an evaluation with another model"):
        run_harness(Knowing(tokenizer), settings, tmp_path / "out", {**ABOUT, "hash": "1" * 64})


FAILING = """
process_results: !function failing.fails
"""


def test_a_task_that_fails_loses_nothing_of_the_others(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    write_choice(tasks, "before", unlike_rows(3))
    write_choice(tasks, "broken", unlike_rows(3), more=FAILING)
    write_choice(tasks, "later", unlike_rows(3))
    (tasks / "failing.py").write_text("def fails(doc, results):\n    raise ZeroDivisionError('a bug of the task')\n")
    write_choice(tasks, "nowhere", unlike_rows(3))
    (tasks / "data" / "nowhere.jsonl").unlink()
    names = ("before", "broken", "nowhere", "later")
    found = run_harness(Knowing(tokenizer), HarnessSettings(names, folder=tasks), tmp_path / "out", ABOUT)
    assert list(found.tasks) == ["before", "later"]
    missing, broken = sorted(found.marks, key=lambda mark: "broken" in mark)
    assert broken == "broken: not measured: broken failed: ZeroDivisionError: a bug of the task"
    assert "nowhere: not measured: nowhere: its questions (json) cannot be had" in missing
    with pytest.raises(PrismError, match="no benchmark could be finished: broken: not measured"):
        run_harness(Knowing(tokenizer), HarnessSettings(("broken",), folder=tasks), tmp_path / "none", ABOUT)


def test_only_the_first_questions_are_marked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_choice(tmp_path / "tasks", "one", unlike_rows(6))
    settings = HarnessSettings(("one",), folder=tmp_path / "tasks", questions=4)
    found = run_harness(Knowing(tokenizer), settings, tmp_path / "out", ABOUT)
    assert found.tasks["one"].questions == 4
    assert found.marks == ["only the first 4 questions of each task were asked"]


def test_chat_template_is_used_where_asked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_choice(tmp_path / "tasks", "one", unlike_rows(3), shots=1)
    settings = HarnessSettings(("one",), folder=tmp_path / "tasks", chat_template=True)
    run_harness(Knowing(tokenizer), settings, tmp_path / "out", ABOUT)
    (first, *_) = read_results(tmp_path / "out" / "samples" / "one.jsonl")
    assert first.prompt.startswith("<user>Question: number")
    assert first.prompt.count("<assistant>") == 2


def test_same_results_on_two_ranks(tmp_path: Path) -> None:
    folder, tasks = save_model(tmp_path / "model"), write_tasks(tmp_path / "tasks")
    two = launch(on_two_ranks, str(folder), str(tasks), str(tmp_path / "two"), processes=2)
    assert dataclasses.asdict(read_evaluation(tmp_path / "two")) == two
    assert two["tasks"]["choices"]["questions"] == 12
    assert two["marks"] == []


# What lm-eval logs of two questions.


def _logged() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    samples = [
        {
            "doc_id": n,
            "filter": "none",
            "metrics": ["acc", "acc_norm"],
            "acc": float(n),
            "acc_norm": 1.0,
            "doc_hash": f"{n}" * 64,
            "target": 0,
            "arguments": [("Question", f" {i}") for i in range(4)],
            "resps": [[(-1.0 - i, False)] for i in range(4)],
            "filtered_resps": [(-1.0 - i, False) for i in range(4)],
        }
        for n in range(2)
    ]
    return samples, {"acc,none": 0.5}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda samples, sums: samples.pop(), "2 questions were asked, but 1 answers came back"),
        (lambda samples, sums: samples.append(samples[0]), "2 questions were asked, but 3 answers"),
        (lambda samples, sums: samples[1].update(doc_id=0), "2 questions were asked"),
        (lambda samples, sums: samples[1].update(filter="other"), "but 1 answers came back"),
        (lambda samples, sums: sums.update({"acc,none": 0.51}), r"our mean of 'acc' is 0\.5, lm-eval's is 0\.51"),
        (lambda samples, sums: sums.clear(), "lm-eval's is None"),
        (lambda samples, sums: samples[0].pop("acc"), "lm-eval gave no 'acc'"),
        (lambda samples, sums: samples[0].update(acc=1.5), "a score from 0 to 1"),
    ],
)
def test_what_lm_eval_logs_is_checked(
    harm: Callable[[list[dict[str, Any]], dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    write_choice(tmp_path, "one", unlike_rows(2))
    (benchmark,) = choose_benchmarks(("one",), tmp_path)
    leaf = load_leaf(task_manager([benchmark], tmp_path), "one", None, None, 0)
    samples, sums = _logged()
    assert len(question_results(leaf, benchmark, samples, sums, len, lambda context, text: False)) == 2
    harm(samples, sums)
    if "acc" not in samples[0]:
        samples[0]["metrics"] = ["acc_norm"]
    with pytest.raises(PrismError, match=message):
        question_results(leaf, benchmark, samples, sums, len, lambda context, text: False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("arc",)}, "benchmark 'arc' is unknown; known: arc_challenge, hellaswag"),
        ({"tasks": ("bbh", "bbh")}, "'bbh' is named twice"),
        ({"data": Path("nowhere")}, "nowhere: is not a folder"),
        ({"folder": Path("nowhere")}, "nowhere: is not a folder of task files"),
        ({"questions": 0}, "questions: 0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(tokenizer: Tokenizer, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_harness(Knowing(tokenizer), HarnessSettings(**settings), tmp_path / "out", ABOUT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: [", "cannot be read as a task"),
        ("task: a\noutput_type: loglikelihood_rolling\n", "has no right and wrong; run it with lm_eval"),
        ("task: a\noutput_type: multiple_choice\n", "metric_list is missing"),
    ],
)
def test_bad_task_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(InputError, match=rf"bad\.yaml: .*{message}"):
        choose_benchmarks(("a",), tmp_path)
