"""Whole evaluations of a real (tiny) model, in processes of their own, and ranks that follow rank 0."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_workers
from fake_models import write_rows
from run_workers import follow
from tiny_training import build_data, character_tokenizer, write_llama

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.answering.regrade import regrade
from prism_nemo.evaluation.answering.store import locked, read_evaluation, read_results
from prism_nemo.evaluation.held_out_loss import task_name
from prism_nemo.evaluation.run import evaluate
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.runtime.launch import launch


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder with its tokenizer, and built data."""
    root = tmp_path_factory.mktemp("evaluate")
    data = build_data(root / "data")
    folder = write_llama(root / "hf")
    for file in (root / "data/tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder, data


def test_the_pocket_suite_runs_from_model_to_scores(setting: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = setting
    settings = EvaluateConfig(
        str(model),
        str(tmp_path / "out"),
        "pocket",
        data=str(data),
        questions=10,
        max_new_tokens=12,
        held_out_rows=8,
        seq_length=16,
        batch=7,
        cache=str(tmp_path / "cache"),
    )
    evaluation = evaluate(settings)
    held = task_name("held")
    assert list(evaluation.tasks) == ["arithmetic", "lists", "formulas", held]
    for name in ("arithmetic", "lists", "formulas"):
        score = evaluation.tasks[name]
        assert (score.metric, score.questions, score.samples) == ("pass@1", 10, 1)
        assert len(read_results(tmp_path / f"out/samples/{name}.jsonl")) == 10
    loss = evaluation.tasks[held]
    assert not loss.higher_is_better
    # A random model of 255 tokens: near log 255 = 5.54; its norms and weights are not tuned to be there exactly.
    assert 4.5 < loss.estimate < 7.0
    assert list(evaluation.averages["domain_weighted"]["of"]) == ["math", "code", "science"]
    assert evaluation.model["kind"] == "huggingface"
    assert read_evaluation(tmp_path / "out") == evaluation
    two = replace(settings, out=str(tmp_path / "two"), cache=None, parallel=ParallelConfig(data_parallel_size=2))
    again = evaluate(two)
    for name in ("arithmetic", "lists", "formulas"):
        first, second = (read_results(tmp_path / f"{folder}/samples/{name}.jsonl") for folder in ("out", "two"))
        assert first == second  # one process or two, in batches of 7 with a rest
    assert again.tasks[held].estimate == pytest.approx(loss.estimate, abs=1e-5)


def test_a_file_of_questions_runs_from_model_to_scores(setting: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = setting
    rows: list[dict[str, Any]] = [
        {"question": f"{i}+{i}?", "answer": 2 * i, "reward": "math", "domain": "math"} for i in range(9)
    ]
    rows += [
        {"question": f"Is {i} odd?", "options": ["yes", "no"], "answer": "A", "reward": "choice"} for i in range(9)
    ]
    quiz = write_rows(tmp_path / "quiz.jsonl", rows)
    settings = EvaluateConfig(
        str(model),
        str(tmp_path / "out"),
        str(quiz),
        formats=("plain", "think"),
        samples=2,
        temperature=1.0,
        max_new_tokens=10,
    )
    evaluation = evaluate(settings)
    score = evaluation.tasks["quiz"]
    assert set(score.details["formats"]) == {"plain", "think"}
    assert score.details["chosen_on"] == "validation"
    results = read_results(tmp_path / "out/samples/quiz.jsonl")
    assert len(results) == score.questions
    assert {r.split for r in results} == {"test"}
    assert sum(score.details["failures"].values()) >= 1  # a random model does not know when to stop
    assert evaluate(settings) == evaluation
    assert regrade(tmp_path / "out").tasks == evaluation.tasks


def test_what_is_wrong_is_said_before_processes_start(setting: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = setting
    base = EvaluateConfig(str(model), str(tmp_path / "out"), "pocket")
    for changes, says in (
        ({"suite": "other"}, "--suite 'other' is unknown; choose reasoning, pocket"),
        ({"model": str(tmp_path)}, "neither a prism-nemo checkpoint"),
        ({"suite": "longcontext"}, "length 4096: the model reads at most 64 tokens"),
        ({"suite": "retention", "split": "validation"}, "has test questions only"),
        ({"held_out": ("held",)}, "--held-out: needs --data"),
        ({"formats": ("chat",)}, "cannot be asked as 'chat'"),
    ):
        with pytest.raises(InputError, match=says):
            evaluate(replace(base, **changes))
    assert not (tmp_path / "out").exists()


def test_the_retention_suite_without_lm_eval_is_refused_before_the_model_is_loaded(
    setting: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'prism-nemo\[eval\]'"):
        evaluate(EvaluateConfig(str(setting[0]), str(tmp_path / "out"), "retention"))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "hf")
    with pytest.raises(InputError, match="--tokenizer"):
        evaluate(EvaluateConfig(str(model), str(tmp_path / "out"), "pocket"))


def test_ranks_do_what_rank_0_asks_for() -> None:
    found = launch(follow, False, processes=2)
    assert [rank for rank, _, _ in found] == [0, 1]
    assert [asked for _, asked, _ in found] == [["generate", "score", "generate"]] * 2
    assert found[0][2] == [[2, 2, 2], [0, 0], [2]]
    assert found[1][2] is None


def test_what_rank_0_raises_ends_all_of_them() -> None:
    with pytest.raises(PrismError, match="rank 0 could not go on"):
        launch(follow, True, processes=2)


def test_settings_on_disk_are_enough_to_judge_again(setting: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = setting
    out = tmp_path / "out"
    evaluate(EvaluateConfig(str(model), str(out), "pocket", tasks=("lists",), questions=4, max_new_tokens=4))
    request = json.loads((out / "settings.json").read_text())["request"]
    assert request["tasks"] == ["lists"]
    request["surprise"] = 1
    told = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**told, "request": request}))
    with pytest.raises(InputError, match="was written by another version"):
        regrade(out)
    (out / "settings.json").write_text(json.dumps({**told, "request": {"suite": "retention"}}))
    with pytest.raises(InputError, match="judged by lm-eval"):
        regrade(out)


@pytest.mark.slow
def test_a_killed_command_goes_on_and_its_ranks_are_gone(tmp_path: Path) -> None:
    """SIGKILL of the command alone, in the middle of the answers."""
    model = write_llama(tmp_path / "hf", max_position_embeddings=512)
    character_tokenizer(model)
    rows = [{"question": f"Say {i}", "answer": "yes", "reward": "exact", "split": "test"} for i in range(30)]
    settings = EvaluateConfig(
        str(model),
        str(tmp_path / "killed"),
        str(write_rows(tmp_path / "quiz.jsonl", rows)),
        formats=("plain",),
        samples=4,
        temperature=1.0,
        max_new_tokens=200,
        batch=8,
    )
    (tmp_path / "settings.pickle").write_bytes(pickle.dumps(settings))
    command = subprocess.Popen([sys.executable, run_workers.__file__, str(tmp_path / "settings.pickle")])
    log = tmp_path / "killed/answers/quiz.test.plain.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 8) and time.monotonic() < deadline:
        assert command.poll() is None
        time.sleep(0.02)
    command.send_signal(signal.SIGKILL)
    command.wait()
    _wait_for_its_lock(tmp_path / "killed")
    assert not (tmp_path / "killed/evaluation.json").exists()  # ranks that go on would have finished it
    resumed = evaluate(settings)
    whole = evaluate(replace(settings, out=str(tmp_path / "whole")))
    assert resumed == whole
    for name in ("evaluation.json", "samples/quiz.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _wait_for_its_lock(out: Path) -> None:
    """The kernel needs a moment to end the ranks, which can be long on a busy machine."""
    deadline = time.monotonic() + 60
    while True:
        try:
            locked(out).release()
            return
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
