"""Which prompt format is used, what it was chosen by, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_models import END, FakeModel, write_rows
from tiny_training import character_tokenizer

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.elicitation import SAMPLES
from prism_nemo.evaluation.answering.store import read_results
from prism_nemo.evaluation.result import Evaluation
from prism_nemo.evaluation.run import evaluate_model
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.generation.requests import Request

ABOUT = {"hash": "h", "name": "fake"}
FORMATS = ("step_by_step", "plain")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return character_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _file(folder: Path, validation: int = 8, test: int = 10) -> Path:
    def rows(split: str, count: int) -> list[dict[str, Any]]:
        return [
            {"question": f"Say {split} {i}", "answer": "yes", "reward": "exact", "split": split} for i in range(count)
        ]

    return write_rows(folder / "quiz.jsonl", rows("validation", validation) + rows("test", test))


def _answer(right: dict[tuple[str, str], bool]) -> Any:
    """Right or wrong by format and split."""

    def answer(prompt: str, _: Request) -> str:
        split = "test" if "Say test" in prompt else "validation"
        form = "step_by_step" if prompt.endswith("Answer:") else "plain"
        return f"{'yes' if right[form, split] else 'no'}{END}"

    return answer


# On validation the plain question is better, on test the other: a choice on test would show.
CROSSED = {
    ("step_by_step", "validation"): False,
    ("step_by_step", "test"): True,
    ("plain", "validation"): True,
    ("plain", "test"): False,
}


def _evaluate(folder: Path, model: FakeModel, **changes: Any) -> Evaluation:
    values = {"formats": FORMATS, "samples": 2, "temperature": 1.0, "max_new_tokens": 8, "batch": 5, **changes}
    return evaluate_model(model, ABOUT, EvaluateConfig("m", str(folder / "out"), str(folder / "quiz.jsonl"), **values))


def test_the_format_is_chosen_on_validation_and_used_on_test(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _file(tmp_path)
    model = FakeModel(tokenizer, _answer(CROSSED))
    score = _evaluate(tmp_path, model).tasks["quiz"]
    assert score.estimate == 0.0  # that of the chosen format on test, not the better one of test
    details = score.details
    assert (details["format"], details["chosen_on"]) == ("plain", "validation")
    assert {name: tried["estimate"] for name, tried in details["formats"].items()} == {"step_by_step": 0, "plain": 1}
    assert all(tried["questions"] == 8 and tried["low"] < tried["high"] for tried in details["formats"].values())
    prompts = [tokenizer.decode(request.prompt) for request in model.requests]
    assert sum("Say test" in prompt for prompt in prompts) == 2 * 10
    assert not any("Say test" in prompt and prompt.endswith("Answer:") for prompt in prompts)
    trials = sorted(path.name for path in (tmp_path / "out/elicitation").iterdir())
    assert trials == ["quiz.validation.plain.jsonl", "quiz.validation.step_by_step.jsonl"]
    assert {r.split for r in read_results(tmp_path / "out/samples/quiz.jsonl")} == {"test"}


def test_of_equal_formats_the_first_is_taken(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _file(tmp_path)
    for formats in (FORMATS, FORMATS[::-1]):
        model = FakeModel(tokenizer, lambda prompt, request: f"yes{END}")
        settings = EvaluateConfig(
            "m", str(tmp_path / formats[0]), str(tmp_path / "quiz.jsonl"), formats=formats, max_new_tokens=8
        )
        assert evaluate_model(model, ABOUT, settings).tasks["quiz"].details["format"] == formats[0]


def test_a_choice_without_validation_questions_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _file(tmp_path, validation=0)
    model = FakeModel(tokenizer, _answer(CROSSED))
    with pytest.raises(InputError, match=r"quiz\.validation\.jsonl .*--choose-on-test, which marks"):
        _evaluate(tmp_path, model)
    assert model.requests == []
    with pytest.raises(InputError, match="chosen among two or more"):
        _evaluate(tmp_path, model, formats=("plain",), elicit=True)


@pytest.mark.parametrize("validation", [0, 8])
def test_a_choice_on_test_is_marked(tmp_path: Path, tokenizer: Tokenizer, validation: int) -> None:
    _file(tmp_path, validation)
    model = FakeModel(tokenizer, _answer(CROSSED))
    evaluation = _evaluate(tmp_path, model, choose_on_test=True)
    score = evaluation.tasks["quiz"]
    assert (score.estimate, score.details["format"], score.details["chosen_on"]) == (1.0, "step_by_step", "test")
    assert evaluation.marks == ["quiz: the prompt format was chosen on the test split, so its score is too high"]
    assert len(model.requests) == 2 * 2 * 10  # each format once: the chosen one is not asked again
    assert len(read_results(tmp_path / "out/samples/quiz.jsonl")) == 10


def test_the_flag_alone_marks_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _file(tmp_path)
    model = FakeModel(tokenizer, _answer(CROSSED))
    assert _evaluate(tmp_path, model, formats=("plain",), choose_on_test=True).marks == []


def test_trials_have_few_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _file(tmp_path, validation=3, test=2)
    model = FakeModel(tokenizer, _answer(CROSSED))
    score = _evaluate(tmp_path, model, samples=SAMPLES + 5).tasks["quiz"]
    assert {tried["samples"] for tried in score.details["formats"].values()} == {SAMPLES}
    assert score.samples == SAMPLES + 5
    assert len(model.requests) == 2 * 3 * SAMPLES + 2 * (SAMPLES + 5)


def test_all_formats_of_a_task_can_be_tried(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _file(tmp_path)
    model = FakeModel(tokenizer, lambda prompt, request: f"yes{END}")
    details = _evaluate(tmp_path, model, formats=(), elicit=True).tasks["quiz"].details
    assert list(details["formats"]) == ["step_by_step", "think", "few_shot", "plain"]
    # In the form with an opened thinking part, an answer that never closes it is none.
    assert details["formats"]["think"]["estimate"] == 0.0
    assert details["formats"]["few_shot"]["estimate"] == 1.0
