"""Evaluations from questions to scores: counted right, resumable at any call, cached, judged again."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fake_models import END, FakeModel, Interrupted, write_rows
from tiny_training import character_tokenizer

from prism_nemo.config import RewardConfig
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation import run
from prism_nemo.evaluation.answering import grading
from prism_nemo.evaluation.answering.regrade import REGRADED, regrade
from prism_nemo.evaluation.answering.scoring import averages, score_task
from prism_nemo.evaluation.answering.store import read_evaluation, read_results
from prism_nemo.evaluation.comparing.folder import read_folder
from prism_nemo.evaluation.comparing.same_questions import check_same
from prism_nemo.evaluation.result import Evaluation
from prism_nemo.evaluation.run import evaluate_model
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.generation.requests import Request

ABOUT = {"path": "m", "kind": "native", "name": "fake", "hash": "h"}
QUESTIONS = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return character_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _rows(count: int = QUESTIONS, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"q{i}", "question": f"Say word {i}.", "answer": f"word {i}", "reward": "exact", "split": "test", **more}
        for i in range(count)
    ]


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "quiz.jsonl", _rows())


def _settings(quiz: Path, out: str = "out", **changes: Any) -> EvaluateConfig:
    values = {"samples": 3, "temperature": 1.0, "max_new_tokens": 16, "formats": ("plain",), "batch": 5, **changes}
    return EvaluateConfig("m", str(quiz.parent / out), str(quiz), **values)


def _by_seed(prompt: str, request: Request) -> str:
    """Right for two seeds of three; which ones is up to the seed."""
    wanted = prompt.removeprefix("Say ").removesuffix(".")
    return f"{wanted if request.sampling.seed % 3 else 'no'}{END}"


def _result_files(out: Path) -> dict[str, str]:
    files = [out / "evaluation.json", *sorted((out / "samples").iterdir())]
    return {path.name: path.read_text() for path in files}


def test_every_answer_is_counted_once(quiz: Path, tokenizer: Tokenizer) -> None:
    """Questions 0 to 2 are right always, 3 in its first answer only, the others never."""
    asked: dict[str, int] = {}

    def answer(prompt: str, _: Request) -> str:
        number = int(prompt.removeprefix("Say word ").removesuffix("."))
        asked[prompt] = asked.get(prompt, 0) + 1
        right = number < 3 or (number == 3 and asked[prompt] == 1)
        return f"{'word ' + str(number) if right else 'no'}{END}"

    evaluation = evaluate_model(FakeModel(tokenizer, answer), ABOUT, _settings(quiz))
    score = evaluation.tasks["quiz"]
    assert (score.questions, score.samples) == (QUESTIONS, 3)
    assert score.estimate == pytest.approx((3 + 1 / 3) / QUESTIONS)
    assert score.low < score.estimate < score.high
    assert score.details["pass@3"] == pytest.approx(4 / QUESTIONS)
    assert score.details["pass@2"] == pytest.approx((3 + 2 / 3) / QUESTIONS)
    assert score.details["maj@3"] == pytest.approx(3 / QUESTIONS)
    assert score.details["answer_rate"] == 1.0
    assert score.details["failures"] == {}
    results = read_results(quiz.parent / "out/samples/quiz.jsonl")
    assert [r.id for r in results] == [f"q{i}" for i in range(QUESTIONS)]
    assert sum(a.correct for r in results for a in r.answers) == 10
    assert [r.correct for r in results[:5]] == pytest.approx([1, 1, 1, 1 / 3, 0])
    assert all(r.gold in r.prompt for r in results)
    assert read_evaluation(quiz.parent / "out") == evaluation
    assert asdict(evaluation)["model"] == ABOUT


def test_faults_of_a_model_are_counted_by_kind(quiz: Path, tokenizer: Tokenizer) -> None:
    answers = {0: f"word 0{END}", 1: END, 2: "word 2", 3: "x" * 99, 4: f"word 4</think>{END}"}

    def answer(prompt: str, _: Request) -> str:
        return answers.get(int(prompt.removeprefix("Say word ").removesuffix(".")), f"no{END}")

    score = evaluate_model(FakeModel(tokenizer, answer), ABOUT, _settings(quiz, samples=1)).tasks["quiz"]
    assert score.estimate == pytest.approx(1 / QUESTIONS)
    assert score.details["failures"] == {"empty": 1, "cut off": 2, "nothing after thinking": 1}
    assert score.details["cut_off_rate"] == pytest.approx(2 / QUESTIONS)
    assert score.details["answer_rate"] == pytest.approx(8 / QUESTIONS)
    # 7, 1, 6, 16 (the limit), 8 and seven times 3 tokens, end tokens counted; "</think>" is one.
    assert score.details["mean_tokens"] == pytest.approx((7 + 1 + 6 + 16 + 8 + 7 * 3) / QUESTIONS)


def test_a_text_that_ends_an_answer_is_no_part_of_it(quiz: Path, tokenizer: Tokenizer) -> None:
    """A base model goes on with questions of its own."""
    model = FakeModel(tokenizer, lambda prompt, _: f" {prompt[14:].partition('.')[0]}\nQuestion: and so on")
    settings = _settings(quiz, formats=("step_by_step",), samples=1, max_new_tokens=64)
    evaluation = evaluate_model(model, ABOUT, settings)
    assert evaluation.tasks["quiz"].estimate == 1.0
    results = read_results(quiz.parent / "out/samples/quiz.jsonl")
    assert results[3].answers[0].text == " word 3"
    assert results[3].answers[0].finished


@pytest.mark.parametrize("calls", range(8))
def test_an_evaluation_goes_on_wherever_it_was_ended(quiz: Path, tokenizer: Tokenizer, calls: int) -> None:
    settings = _settings(quiz)
    whole = FakeModel(tokenizer, _by_seed)
    evaluate_model(whole, ABOUT, replace(settings, out=str(quiz.parent / "whole")))
    first = FakeModel(tokenizer, _by_seed, calls=calls)
    with pytest.raises(Interrupted):
        evaluate_model(first, ABOUT, settings)
    with pytest.raises(InputError, match="was not finished"):
        read_evaluation(quiz.parent / "out")
    second = FakeModel(tokenizer, _by_seed)
    evaluate_model(second, ABOUT, settings)
    assert _result_files(quiz.parent / "out") == _result_files(quiz.parent / "whole")
    # 36 answers in batches of 5; none is asked for twice.
    assert len(first.requests) == 5 * calls
    assert first.requests + second.requests == whole.requests
    assert list((quiz.parent / "out/answers").iterdir()) == []


def test_verdicts_that_were_interrupted_need_no_model(
    quiz: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(quiz)
    with monkeypatch.context() as patch:
        patch.setattr(grading.Grader, "_graded", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            evaluate_model(FakeModel(tokenizer, _by_seed), ABOUT, settings)
    silent = FakeModel(tokenizer, _by_seed, calls=0)
    assert evaluate_model(silent, ABOUT, settings).tasks["quiz"].questions == QUESTIONS
    again = FakeModel(tokenizer, _by_seed, calls=0)
    assert evaluate_model(again, ABOUT, settings) == read_evaluation(quiz.parent / "out")


def test_the_seed_the_question_and_the_sample_decide_an_answer(quiz: Path, tokenizer: Tokenizer) -> None:
    def seeds(out: str, **changes: Any) -> dict[tuple[str, int], int]:
        model = FakeModel(tokenizer, _by_seed)
        evaluate_model(model, ABOUT, _settings(quiz, out, **changes))
        found: dict[tuple[str, int], int] = {}
        for request in model.requests:
            prompt = tokenizer.decode(request.prompt)
            found[prompt, sum(p == prompt for p, _ in found)] = request.sampling.seed
        return found

    base = seeds("a")
    assert len(set(base.values())) == len(base) == 3 * QUESTIONS
    assert seeds("b", batch=7) == base
    fewer = seeds("c", questions=4, samples=2)
    assert len(fewer) == 8
    assert fewer.items() <= base.items()
    assert set(seeds("d", seed=1).values()).isdisjoint(base.values())


def test_another_evaluation_takes_answers_from_the_cache(quiz: Path, tokenizer: Tokenizer) -> None:
    settings = _settings(quiz, cache=str(quiz.parent / "cache"))
    first = evaluate_model(FakeModel(tokenizer, _by_seed), ABOUT, settings)
    silent = FakeModel(tokenizer, _by_seed, calls=0)
    same = evaluate_model(silent, ABOUT, replace(settings, out=str(quiz.parent / "same"), batch=3))
    assert same == first
    assert _result_files(quiz.parent / "same") == _result_files(quiz.parent / "out")
    others: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"seed": 2}, ABOUT),
        ({"temperature": 0.5}, ABOUT),
        ({"samples": 2}, ABOUT),
        ({"formats": ("step_by_step",)}, ABOUT),
        ({"max_new_tokens": 17}, ABOUT),
        ({}, {**ABOUT, "hash": "other"}),
    ]
    for number, (changes, about) in enumerate(others):
        with pytest.raises(Interrupted):
            evaluate_model(silent, about, replace(settings, out=str(quiz.parent / f"other{number}"), **changes))
    # A corrected answer is judged anew, without the model.
    write_rows(quiz, [{**row, "answer": "no"} for row in _rows()])
    corrected = evaluate_model(silent, ABOUT, replace(settings, out=str(quiz.parent / "corrected")))
    assert corrected.tasks["quiz"].estimate == pytest.approx(1 - first.tasks["quiz"].estimate)


def test_a_folder_of_another_evaluation_is_refused(quiz: Path, tokenizer: Tokenizer) -> None:
    model = FakeModel(tokenizer, _by_seed)
    evaluate_model(model, ABOUT, _settings(quiz))
    for changes, about, says in (
        ({"seed": 2}, ABOUT, "another seed; use another folder"),
        ({}, {**ABOUT, "hash": "other"}, "another model; use another folder, or remove this one"),
        (
            {"rewards": RewardConfig(gate="none", code_seconds=4.0)},
            ABOUT,
            r"judged with another judging\.code_seconds; judge its answers again \(prism-nemo regrade\), or",
        ),
    ):
        with pytest.raises(InputError, match=says):
            evaluate_model(model, about, _settings(quiz, **changes))
    write_rows(quiz, _rows(5))
    with pytest.raises(InputError, match=r"tasks\.quiz\.questions"):
        evaluate_model(model, ABOUT, _settings(quiz))


def test_what_says_nothing_of_the_answers_may_change(quiz: Path, tokenizer: Tokenizer) -> None:
    evaluate_model(FakeModel(tokenizer, _by_seed, calls=9), ABOUT, _settings(quiz))
    moved = write_rows(quiz.parent / "elsewhere/quiz.jsonl", _rows())
    settings = replace(_settings(quiz, batch=2), suite=str(moved), model="moved")
    evaluate_model(FakeModel(tokenizer, _by_seed, calls=0), ABOUT, settings)


def test_answers_are_as_long_as_the_model_allows_and_that_is_marked(quiz: Path, tokenizer: Tokenizer) -> None:
    model = FakeModel(tokenizer, _by_seed, max_length=24)  # "Say word 11." has 12 tokens
    evaluation = evaluate_model(model, ABOUT, _settings(quiz))
    assert evaluation.marks == ["quiz: answers had 12 to 13 tokens and not 16: the model reads no more"]
    sampling = evaluation.tasks["quiz"].details["sampling"]
    assert (sampling["max_new_tokens"], sampling["max_new_tokens_of_the_model"]) == (16, 12)


def test_a_prompt_without_room_is_refused_before_anything_is_asked(quiz: Path, tokenizer: Tokenizer) -> None:
    model = FakeModel(tokenizer, _by_seed, max_length=12)
    with pytest.raises(InputError, match=r"question 'q10' is a prompt of 12 tokens in format 'plain'; the model reads"):
        evaluate_model(model, ABOUT, _settings(quiz))
    assert model.requests == []
    assert not (quiz.parent / "out").exists()


def test_questions_of_the_other_split_are_not_asked(quiz: Path, tokenizer: Tokenizer) -> None:
    model = FakeModel(tokenizer, _by_seed)
    with pytest.raises(InputError, match=r"quiz: has no validation questions; put them into quiz\.validation"):
        evaluate_model(model, ABOUT, _settings(quiz, split="validation"))
    rows = [{**row, "id": f"v{row['id']}", "question": f"{row['question']}?", "split": None} for row in _rows(4)]
    write_rows(quiz.parent / "quiz.validation.jsonl", rows)
    evaluation = evaluate_model(model, ABOUT, _settings(quiz, split="validation"))
    assert (evaluation.split, evaluation.tasks["quiz"].questions) == ("validation", 4)
    assert all(tokenizer.decode(r.prompt).endswith("?") for r in model.requests)


def test_answers_can_be_judged_again(quiz: Path, tokenizer: Tokenizer) -> None:
    out = quiz.parent / "out"
    before = evaluate_model(FakeModel(tokenizer, _by_seed), ABOUT, _settings(quiz))
    files = _result_files(out)
    same = regrade(out)
    assert same == replace(before, marks=[REGRADED])
    assert _result_files(out)["quiz.jsonl"] == files["quiz.jsonl"]
    write_rows(quiz, [{**row, "answer": "no"} for row in _rows()])
    corrected = regrade(out)
    assert corrected.tasks["quiz"].estimate == pytest.approx(1 - before.tasks["quiz"].estimate)
    assert corrected.marks == [REGRADED]
    assert read_evaluation(out) == corrected
    # The same command finds the folder as it left it.
    silent = FakeModel(tokenizer, _by_seed, calls=0)
    assert evaluate_model(silent, ABOUT, _settings(quiz)).tasks == corrected.tasks
    shutil.copytree(out, quiz.parent / "before")
    broken = RewardConfig(gate="none", verifiers={"exact": "fake_models:Raises"})
    failed = regrade(out, broken)
    task = failed.tasks["quiz"]
    assert (task.estimate, task.details["failures"]) == (0.0, {"raised ZeroDivisionError": 3 * QUESTIONS})
    # What is there now was judged otherwise: it is not compared with what was not, nor goes on as if it were.
    with pytest.raises(InputError, match=r"setting judging\.verifiers\.exact: not set and fake_models:Raises"):
        check_same(read_folder(quiz.parent / "before"), read_folder(out))
    assert regrade(out).tasks == failed.tasks
    with pytest.raises(InputError, match=r"another judging\.verifiers\.exact"):
        evaluate_model(silent, ABOUT, _settings(quiz))


def test_answers_to_other_questions_are_not_judged(quiz: Path, tokenizer: Tokenizer) -> None:
    out = quiz.parent / "out"
    evaluate_model(FakeModel(tokenizer, _by_seed), ABOUT, _settings(quiz))
    for rows, says in (
        ([{**row, "question": row["question"] + "!"} for row in _rows()], "question 'q0' reads otherwise now"),
        (_rows(QUESTIONS - 1), "question 'q11' is not in the task any more"),
    ):
        write_rows(quiz, rows)
        with pytest.raises(InputError, match=says):
            regrade(out)


def test_choices_know_their_chance_and_votes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    colours = ["red", "blue", "green", "grey"]
    row = {"answer": 0, "reward": "choice", "split": "test"}
    rows = [{"question": f"Which {i}?", "options": colours[: 4 - i % 2], **row} for i in range(6)]
    quiz = write_rows(tmp_path / "quiz.jsonl", rows)
    evaluation = evaluate_model(FakeModel(tokenizer, lambda *_: f"red{END}"), ABOUT, _settings(quiz))
    score = evaluation.tasks["quiz"]
    assert score.chance == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert (score.estimate, score.details["maj@3"]) == (1.0, 1.0)
    results = read_results(tmp_path / "out/samples/quiz.jsonl")
    assert all(answer.read == r.gold for r in results for answer in r.answers)
    assert len({r.gold for r in results}) > 1


def _scored(tmp_path: Path, tokenizer: Tokenizer, names: dict[str, tuple[str, float]]) -> Any:
    scores, results = {}, {}
    for name, (domain, share) in names.items():
        quiz = write_rows(tmp_path / name / f"{name}.jsonl", _rows(10, domain=domain))

        def answer(prompt: str, _: Request, share: float = share) -> str:
            number = int(prompt.removeprefix("Say word ").removesuffix("."))
            return f"{'word ' + str(number) if number < 10 * share else 'no'}{END}"

        evaluation = evaluate_model(FakeModel(tokenizer, answer), ABOUT, _settings(quiz))
        scores[name] = evaluation.tasks[name]
        results[name] = read_results(quiz.parent / f"out/samples/{name}.jsonl")
    return averages(scores, results)


def test_the_domain_weighted_average_is_the_studys(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Mean of three domain means: GPQA weighs a third, each set of mathematics a ninth, each of code a sixth."""
    shares = {
        "aime24": ("math", 0.1),
        "aime25": ("math", 0.3),
        "math500": ("math", 0.8),
        "livecodebench": ("code", 0.2),
        "codeforces": ("code", 0.4),
        "gpqa_diamond": ("science", 0.9),
    }
    found = _scored(tmp_path, tokenizer, shares)
    weighted, plain = found["domain_weighted"], found["plain_mean"]
    assert weighted["estimate"] == pytest.approx((0.4 + 0.3 + 0.9) / 3)
    assert plain["estimate"] == pytest.approx(2.7 / 6)
    assert weighted["low"] < weighted["estimate"] < weighted["high"]
    assert weighted["of"]["math"] == ["aime24", "aime25", "math500"]
    assert list(plain["of"]["all"]) == list(shares)


def test_averages_are_over_what_there_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert _scored(tmp_path / "a", tokenizer, {"one": ("math", 0.5)}) == {}
    two = _scored(tmp_path / "b", tokenizer, {"one": ("math", 0.5), "two": ("code", 0.1)})
    assert two["domain_weighted"]["of"] == {"math": ["one"], "code": ["two"]}
    other = _scored(tmp_path / "c", tokenizer, {"one": ("math", 0.5), "two": ("trivia", 0.1)})
    assert list(other) == ["plain_mean"]


def test_pocket_scores_are_those_of_its_tasks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A model that knows the worked answers is right everywhere; one that leaves out the thinking nowhere."""
    settings = EvaluateConfig("m", str(tmp_path / "a"), "pocket", questions=9, seed=5)
    suite = run.build_suite(settings)
    known = {q.problem.prompt: q.problem.document[len(q.problem.prompt) :] for t in suite.tasks for q in t.questions}
    right = evaluate_model(FakeModel(tokenizer, lambda prompt, _: known[prompt] + END), ABOUT, settings)
    assert [score.estimate for score in right.tasks.values()] == [1.0] * 3
    assert {score.domain for score in right.tasks.values()} == {"math", "code", "science"}
    assert all(score.questions == 9 and score.samples == 1 for score in right.tasks.values())
    bare = FakeModel(tokenizer, lambda prompt, _: known[prompt].partition("</think>")[2] + END)
    wrong = evaluate_model(bare, ABOUT, replace(settings, out=str(tmp_path / "b")))
    assert [score.estimate for score in wrong.tasks.values()] == [0.0] * 3
    assert [score.details["answer_rate"] for score in wrong.tasks.values()] == [0.0] * 3


def test_numbers_of_a_score_come_from_its_questions(quiz: Path, tokenizer: Tokenizer) -> None:
    """A score is a function of what is on disk: nothing of a run is left in it."""
    settings = _settings(quiz)
    evaluation = evaluate_model(FakeModel(tokenizer, _by_seed), ABOUT, settings)
    (task,) = run.build_suite(settings).tasks
    results = read_results(quiz.parent / "out/samples/quiz.jsonl")
    details = evaluation.tasks["quiz"].details
    told = {key: details[key] for key in ("format", "sampling", "source")}
    assert score_task(task, list(task.questions), results, told) == evaluation.tasks["quiz"]
    assert details["source"]["sha256"] == hashlib.sha256(quiz.read_bytes()).hexdigest()
    settings_file = json.loads((quiz.parent / "out/settings.json").read_text())
    assert settings_file["identity"]["model"] == "h"
    assert "model" not in evaluation.settings


def test_the_evaluation_is_a_value(quiz: Path, tokenizer: Tokenizer) -> None:
    evaluation = evaluate_model(FakeModel(tokenizer, _by_seed), ABOUT, _settings(quiz))
    assert isinstance(evaluation, Evaluation)
    assert json.loads(json.dumps(asdict(evaluation))) == asdict(evaluation)


def test_a_samples_file_that_lost_a_question_is_refused(quiz: Path, tokenizer: Tokenizer) -> None:
    """Scoring what is left of it would be another denominator."""
    evaluate_model(FakeModel(tokenizer, _by_seed), ABOUT, _settings(quiz))
    samples = quiz.parent / "out/samples/quiz.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"quiz\.jsonl: does not have the questions that are asked; remove it"):
        evaluate_model(FakeModel(tokenizer, _by_seed, calls=0), ABOUT, _settings(quiz))
    samples.unlink()
    assert evaluate_model(FakeModel(tokenizer, _by_seed), ABOUT, _settings(quiz)).tasks["quiz"].questions == QUESTIONS


def test_evaluations_of_two_models_have_the_same_settings(quiz: Path, tokenizer: Tokenizer) -> None:
    """They are compared question by question only if they have."""
    found = [
        evaluate_model(FakeModel(tokenizer, _by_seed), {**ABOUT, "hash": name}, _settings(quiz, name))
        for name in ("one", "two")
    ]
    assert found[0].settings == found[1].settings
    assert found[0].model != found[1].model
    other = evaluate_model(FakeModel(tokenizer, _by_seed), ABOUT, _settings(quiz, "other", seed=1))
    assert other.settings != found[0].settings


def test_long_texts_are_asked_as_they_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    settings = EvaluateConfig(
        "m", str(tmp_path / "out"), "longcontext", tasks=("needle_single",), lengths=(4096,), questions=4
    )
    suite = run.build_suite(settings, tokenizer, 4096)
    gold = {q.problem.text: q.problem.answer for task in suite.tasks for q in task.questions}
    right = list(gold)[:3]
    model = FakeModel(tokenizer, lambda prompt, _: f" {gold[prompt] if prompt in right else 'none'}\n\nQuestion:")
    evaluation = evaluate_model(model, ABOUT, settings)
    (score,) = evaluation.tasks.values()
    assert (score.domain, score.estimate, score.questions) == ("long_context", 0.75, 4)
    assert evaluation.marks == []  # the longest answer fits behind every text
    assert {tokenizer.decode(request.prompt) for request in model.requests} == set(gold)
    with pytest.raises(InputError, match="length 4096: the model reads at most 4000"):
        run.build_suite(settings, tokenizer, 4000)
