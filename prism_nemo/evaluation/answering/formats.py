"""How a question is put to a model: all of the prompts' text, by the name of the format.

| format | what the model is given |
|---|---|
| ``think`` | ``Q: ...`` and an opened thinking part, the form of mid-training and reinforcement learning here |
| ``step_by_step`` | the question, how to answer it, and ``Answer:`` |
| ``few_shot`` | four validation questions with their answers, then the question in the same form |
| ``chat`` | what `step_by_step` says, as the user's turn in the tokenizer's chat template |
| ``plain`` | the question and nothing else |

A base model that was not asked properly looks as if it could not answer, so it is tried with several
(`elicitation.py`). A row that words its own ``prompt`` is given word for word in every format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.question import EvaluationTask, Question
from prism_nemo.evaluation.suites.build import order_of
from prism_nemo.rl.rewards.choice import LETTERS
from prism_nemo.rl.rewards.task import OPEN, Problem

EXAMPLES = 4
_BOXED = "Answer step by step, and put the final answer in \\boxed{}."
_INSTRUCTIONS = {
    "choice": "Answer step by step, and put the letter of the right option in \\boxed{}.",
    "code": "Think step by step, then write the whole program in one block that begins with ```python.",
}


@dataclass(frozen=True)
class PromptFormat:
    """One way to ask.

    Attributes:
        name: Of the format.
        template: With ``{question}`` and perhaps ``{instruction}``.
        stop_texts: Texts that end an answer: a base model goes on with questions of its own.
        examples: Number of validation questions shown before.
        chat: Whether the template is the user's turn of a conversation.
    """

    name: str
    template: str
    stop_texts: tuple[str, ...] = ()
    examples: int = 0
    chat: bool = False


FORMATS = {
    form.name: form
    for form in (
        PromptFormat("think", f"Q: {{question}}\n{OPEN}"),
        PromptFormat("step_by_step", "Question: {question}\n{instruction}\nAnswer:", ("\nQuestion:",)),
        PromptFormat("few_shot", "Question: {question}\nAnswer:", ("\nQuestion:", "\n\nQ: "), EXAMPLES),
        PromptFormat("chat", "{question}\n\n{instruction}", chat=True),
        PromptFormat("plain", "{question}"),
    )
}


def format_named(name: str) -> PromptFormat:
    """The format of a name.

    Raises:
        InputError: If there is none.
    """
    if name not in FORMATS:
        raise InputError(f"--format '{name}' is unknown; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def check_format(form: PromptFormat, task: EvaluationTask, folder: Path | None) -> None:
    """Refuse a format that a task's questions cannot be put into.

    Args:
        form: The format.
        task: With all of its questions.
        folder: Of the tokenizer; None if it is not known yet.

    Raises:
        InputError: Saying what is missing.
    """
    if form.name not in task.formats and not (form.chat and all(q.problem.verifier for q in task.questions)):
        raise InputError(
            f"{task.name}: its questions cannot be asked as '{form.name}'; choose among {', '.join(task.formats)}"
        )
    if form.examples:
        shown = [q for q in task.questions if q.split == "validation" and _can_be_shown(q.problem)]
        if len(shown) <= form.examples:
            raise InputError(
                f"{task.name}: format '{form.name}' shows {form.examples} validation questions with their answers, and "
                f"there are {len(shown)}; it needs {form.examples + 1} (one is left out where it is asked itself). Put "
                "them into a file with .validation before its ending, or use another format"
            )
    if form.chat and folder is not None:
        chat_template(folder)


def render(form: PromptFormat, task: EvaluationTask, asked: Sequence[Question], folder: Path) -> list[str]:
    """The prompts of questions, in their order.

    Args:
        form: The format.
        task: With its validation questions, for formats that show some.
        asked: Questions of the task.
        folder: Of the tokenizer, for its chat template.
    """
    pool = sorted(
        (q for q in task.questions if q.split == "validation" and _can_be_shown(q.problem)),
        key=lambda q: order_of(q.id),
    )
    chat = chat_template(folder) if form.chat else None
    return [_render(form, question, pool, chat) for question in asked]


def shown_question(problem: Problem) -> str:
    """The question with its lettered options, if it has any, in the order that the verifier knows."""
    options = problem.metadata.get("options")
    if not options:
        return problem.question
    return "\n".join([problem.question, *(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))])


def _render(form: PromptFormat, question: Question, pool: Sequence[Question], chat: Callable[[str], str] | None) -> str:
    problem = question.problem
    if problem.text:
        return problem.text
    if problem.work:
        # A procedural task: its own form is the only one in which its answers are judged.
        usual = problem.prompt
    else:
        usual = form.template.replace("{instruction}", _instruction(problem))
        usual = usual.replace("{question}", shown_question(problem))
    if chat is not None:
        return chat(usual)
    examples = [q.problem for q in pool if q.id != question.id][: form.examples]
    return "".join(f"{_answered(example)}\n\n" for example in examples) + usual


def _instruction(problem: Problem) -> str:
    return _INSTRUCTIONS.get(problem.verifier, _BOXED)


def _can_be_shown(problem: Problem) -> bool:
    """Whether a right answer to a question can be written down."""
    if problem.verifier == "code":
        return bool(problem.metadata.get("solution")) and not problem.text
    return bool(problem.work or problem.answer) and not problem.text


def _answered(problem: Problem) -> str:
    """A question with its right answer, as `few_shot` shows it."""
    if problem.work:
        return problem.document
    asked = FORMATS["few_shot"].template.replace("{question}", shown_question(problem))
    solution = str(problem.metadata.get("solution") or "").strip()
    if problem.verifier == "code":
        return f"{asked}\n```python\n{solution}\n```"
    said = f"The answer is {problem.answer}."
    return f"{asked} {solution}\n{said}" if solution else f"{asked} {said}"


def chat_template(folder: Path) -> Callable[[str], str]:
    """What puts a user's turn into a tokenizer's chat template.

    Raises:
        InputError: If the tokenizer has none.
    """
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(folder)
    if not loaded.chat_template:
        raise InputError(f"--format chat: the tokenizer in {folder} has no chat template; choose another format")

    def fill(text: str) -> str:
        turns = [{"role": "user", "content": text}]
        return str(loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    return fill


def first_tokens(tokenizer: Tokenizer, bos: bool | None) -> list[int]:
    """Ids that every prompt begins with: those that the tokenizer itself puts there, or none.

    A model that was trained with a first token and asked without it answers worse, and nothing shows it.

    Args:
        tokenizer: The model's.
        bos: None for what the tokenizer does where special tokens are asked for; True for its ``bos_token`` in any
            case; False for none.

    Raises:
        InputError: If `bos` is True and it has none.
    """
    if bos is False:
        return []
    inner = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    if bos is None:
        # Of a template that also ends or separates texts, nothing can be told to be a beginning.
        added, probe = inner.encode("", add_special_tokens=True).ids, inner.encode("a", add_special_tokens=True).ids
        return added if len(added) == 1 and probe[:1] == added else []
    config = tokenizer.path.parent / "tokenizer_config.json"
    token = json.loads(config.read_text(encoding="utf-8")).get("bos_token") if config.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    found = inner.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise InputError(f"--bos: {config} names no bos_token that the tokenizer has; leave the option out")
    return [found]


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: the end token, and what ``generation_config.json`` beside the tokenizer names.

    Raises:
        InputError: If that file is not readable.
    """
    path = tokenizer.path.parent / "generation_config.json"
    named: Any = []
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path}: is not a JSON object: {error}") from None
    ids = [named] if isinstance(named, int) else [id for id in named if isinstance(id, int)]
    return tuple(dict.fromkeys([tokenizer.eos_id, *ids]))
