"""Prompts word for word, examples that give nothing away, first and last tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tiny_training import character_tokenizer

from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.formats import (
    EXAMPLES,
    FORMATS,
    check_format,
    first_tokens,
    format_named,
    render,
    stop_tokens,
)
from prism_nemo.evaluation.question import EvaluationTask, Question
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.evaluation.suites.pocket import pocket_tasks
from prism_nemo.rl.rewards.task import Problem

MATH = Problem("t", "What is 2+5?", "", "7", verifier="math")
CHOICE = Problem("t", "Capital of Peru?", "", "B", {"options": ["Quito", "Lima"]}, verifier="choice")
CODE = Problem("t", "Print 7.", "", "", {"cases": [["", "7"]]}, verifier="code")
_BOXED = "put the final answer in \\boxed{}."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return character_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _task(*problems: Problem, validation: int = 0) -> EvaluationTask:
    shown = [replace(MATH, question=f"What is {i}+0?", answer=str(i)) for i in range(validation)]
    questions = [Question(f"q{i}", "test", p) for i, p in enumerate(problems)]
    questions += [Question(f"v{i}", "validation", p) for i, p in enumerate(shown)]
    return EvaluationTask("quiz", "math", questions, formats=tuple(FORMATS))


def _prompt(name: str, problem: Problem, folder: Path) -> str:
    task = _task(problem)
    (text,) = render(format_named(name), task, task.questions, folder)
    return text


@pytest.mark.parametrize(
    ("name", "problem", "expected"),
    [
        ("think", MATH, "Q: What is 2+5?\n<think>"),
        ("plain", MATH, "What is 2+5?"),
        ("plain", CHOICE, "Capital of Peru?\nA. Quito\nB. Lima"),
        ("step_by_step", MATH, f"Question: What is 2+5?\nAnswer step by step, and {_BOXED}\nAnswer:"),
        (
            "step_by_step",
            CHOICE,
            "Question: Capital of Peru?\nA. Quito\nB. Lima\n"
            "Answer step by step, and put the letter of the right option in \\boxed{}.\nAnswer:",
        ),
        (
            "step_by_step",
            CODE,
            "Question: Print 7.\nThink step by step, then write the whole program in one block that begins with "
            "```python.\nAnswer:",
        ),
        ("think", replace(MATH, text="Word for word"), "Word for word"),
        ("step_by_step", replace(MATH, text="Word for word"), "Word for word"),
        # Braces and the names of places are text in a question.
        (
            "step_by_step",
            replace(MATH, question="f{x} {instruction}"),
            f"Question: f{{x}} {{instruction}}\nAnswer step by step, and {_BOXED}\nAnswer:",
        ),
    ],
)
def test_prompts_word_for_word(name: str, problem: Problem, expected: str, tokenizer: Tokenizer) -> None:
    assert _prompt(name, problem, tokenizer.path.parent) == expected


def test_examples_are_validation_questions_and_never_the_question_itself(tokenizer: Tokenizer) -> None:
    task = _task(MATH, validation=EXAMPLES + 1)
    form = format_named("few_shot")
    check_format(form, task, None)
    texts = render(form, task, task.questions, tokenizer.path.parent)
    for question, text in zip(task.questions, texts, strict=True):
        asked = f"Question: {question.problem.question}\nAnswer:"
        assert text.endswith(asked)
        assert text.count("The answer is") == EXAMPLES
        assert text.count(question.problem.question) == 1
        assert "What is 2+5?" not in text.removesuffix(asked)
    # Every test question gets the same examples, so that scores differ by the questions alone.
    more = _task(MATH, replace(MATH, question="And 3+3?"), validation=EXAMPLES + 1)
    two = render(form, more, more.questions[:2], tokenizer.path.parent)
    assert two[0].rpartition("Question:")[0] == two[1].rpartition("Question:")[0]


def test_examples_show_solutions_where_there_are_some(tokenizer: Tokenizer) -> None:
    solved = replace(CODE, metadata={**CODE.metadata, "solution": "print(7)"})
    questions = [Question("q", "test", CODE)]
    questions += [Question(f"v{i}", "validation", replace(solved, question=f"Task {i}.")) for i in range(5)]
    task = EvaluationTask("quiz", "code", questions, formats=("few_shot",))
    (text,) = render(format_named("few_shot"), task, questions[:1], tokenizer.path.parent)
    assert text.count("Answer:\n```python\nprint(7)\n```\n\n") == EXAMPLES
    unsolved = replace(task, questions=[replace(q, problem=CODE) for q in questions])
    with pytest.raises(InputError, match="there are 0; it needs 5"):
        check_format(format_named("few_shot"), unsolved, None)


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(InputError, match=f"there are {EXAMPLES}; it needs {EXAMPLES + 1}"):
        check_format(format_named("few_shot"), _task(MATH, validation=EXAMPLES), None)


def test_a_procedural_task_keeps_its_form(tokenizer: Tokenizer) -> None:
    (task,) = pocket_tasks(EvaluateConfig("m", "o", suite="pocket", tasks=("arithmetic",), questions=8))
    asked = [q for q in task.questions if q.split == "test"]
    (think,) = render(format_named("think"), task, asked[:1], tokenizer.path.parent)
    assert think == asked[0].problem.prompt
    (few,) = render(format_named("few_shot"), task, asked[:1], tokenizer.path.parent)
    documents = few.removesuffix(think).split("\n\n")
    known = {q.problem.document for q in task.questions if q.split == "validation"}
    assert len(documents) == EXAMPLES + 1
    assert documents.pop() == ""
    assert set(documents) <= known
    for name in ("step_by_step", "chat"):
        with pytest.raises(InputError, match=f"cannot be asked as '{name}'; choose among think, few_shot"):
            check_format(format_named(name), task, None)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InputError, match="'steps' is unknown; choose one of think"):
        format_named("steps")


def test_chat_is_the_tokenizers_template(tmp_path: Path) -> None:
    character_tokenizer(tmp_path)
    form = format_named("chat")
    with pytest.raises(InputError, match="has no chat template"):
        check_format(form, _task(MATH), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    check_format(form, _task(MATH), tmp_path)
    text = _prompt("chat", MATH, tmp_path)
    assert text == f"<user>What is 2+5?\n\nAnswer step by step, and {_BOXED}</><assistant>"


def _with_template(folder: Path, single: str) -> Tokenizer:
    path = character_tokenizer(folder).path
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    inner.save(str(path))
    return load_tokenizer(folder)


def test_prompts_begin_as_the_tokenizer_begins_texts(tmp_path: Path) -> None:
    plain = character_tokenizer(tmp_path / "plain")
    assert first_tokens(plain, None) == first_tokens(plain, False) == []
    with pytest.raises(InputError, match="names no bos_token"):
        first_tokens(plain, True)
    begins = _with_template(tmp_path / "begins", "<pad> $A")
    assert first_tokens(begins, None) == [0]
    assert first_tokens(begins, False) == []
    # An end is no beginning: a prompt that begins with it would be a text that is over.
    assert first_tokens(_with_template(tmp_path / "ends", "$A <eos>"), None) == []
    assert first_tokens(_with_template(tmp_path / "both", "<pad> $A <eos>"), None) == []
    config = json.loads((tmp_path / "plain/tokenizer_config.json").read_text())
    (tmp_path / "plain/tokenizer_config.json").write_text(json.dumps({**config, "bos_token": {"content": "<think>"}}))
    assert first_tokens(load_tokenizer(tmp_path / "plain"), True) == [2]


def test_answers_end_with_any_of_the_models_end_tokens(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(tmp_path)
    assert stop_tokens(tokenizer) == (tokenizer.eos_id,)
    for named, expected in ((3, (1, 3)), ([1, 2], (1, 2)), (None, (1,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert stop_tokens(tokenizer) == expected
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json: is not a JSON object"):
        stop_tokens(tokenizer)
