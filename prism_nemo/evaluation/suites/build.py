"""What is asked: the benchmarks of the study, a file of questions, procedural tasks, or long texts.

Sampling of `REASONING` as the study has it (arXiv 2603.17074, evaluation section); where it gives no value, ours is
named in `Benchmark.ours`. The average that it reports is the mean of three domain means (see `scoring.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.question import AskedSampling, EvaluationTask, Question
from prism_nemo.evaluation.settings import EvaluateConfig, check_sampling
from prism_nemo.evaluation.suites.hub_rows import HubSource, fetch
from prism_nemo.evaluation.suites.long_context.suite import KINDS, LENGTHS, long_context_tasks
from prism_nemo.evaluation.suites.question_file import ENDINGS, find_file, read_questions, stem_of

_MATH = AskedSampling(samples=64, temperature=0.6, top_p=0.95, max_new_tokens=32768)
_THREE = AskedSampling(samples=3, temperature=0.7, top_p=1.0, max_new_tokens=32768)
_FORMATS = ("step_by_step", "think", "few_shot", "plain")
_CODE_FORMATS = ("step_by_step", "think", "plain")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of the study.

    Attributes:
        domain: What the domain-weighted average is taken over.
        reward: Verifier of rows that name none.
        sampling: The study's.
        asked: Number of questions that the study's printed scores imply.
        hub: Where its questions can be had.
        formats: That a model is tried with; the first is used where none is asked for.
        ours: Sampling values that the study does not state.
    """

    domain: str
    reward: str
    sampling: AskedSampling
    asked: int
    hub: HubSource
    formats: tuple[str, ...] = _FORMATS
    ours: tuple[str, ...] = ()

    @property
    def keys(self) -> str:
        """Keys that a row of its file needs, for messages."""
        return {
            "math": "'question' and 'answer'",
            "choice": "'question', 'options' (a list of texts) and 'answer' (index from 0, or letter)",
            "code": "'question' and 'metadata' with 'cases' ([[stdin, stdout], ...])",
        }[self.reward]


REASONING = {
    "aime24": Benchmark("math", "math", _MATH, 30, HubSource("HuggingFaceH4/aime_2024", "train", "aime")),
    "aime25": Benchmark("math", "math", _MATH, 30, HubSource("math-ai/aime25", "test", "aime")),
    "math500": Benchmark("math", "math", _MATH, 500, HubSource("HuggingFaceH4/MATH-500", "test", "math500")),
    "livecodebench": Benchmark(
        "code",
        "code",
        _THREE,
        279,
        HubSource(
            "livecodebench/code_generation_lite",
            "train",
            "livecodebench",
            files=("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl"),
        ),
        _CODE_FORMATS,
        ("top_p",),
    ),
    "codeforces": Benchmark(
        "code", "code", _THREE, 453, HubSource("open-r1/codeforces", "test", "codeforces"), _CODE_FORMATS, ("top_p",)
    ),
    # The study says nothing about GPQA's sampling. Its printed decimals fit 198 questions of 3 answers only.
    "gpqa_diamond": Benchmark(
        "science",
        "choice",
        _THREE,
        198,
        HubSource("Idavidrein/gpqa", "train", "gpqa", config="gpqa_diamond"),
        _FORMATS,
        ("temperature", "top_p", "max_new_tokens"),
    ),
}
SUITES = ("reasoning", "pocket", "longcontext", "retention")
_LONG_QUESTIONS = 50


@dataclass(frozen=True)
class Suite:
    """The tasks of an evaluation.

    Attributes:
        name: Of the suite.
        tasks: With the questions of all splits that there are.
        marks: What a reader of the result has to know.
    """

    name: str
    tasks: list[EvaluationTask]
    marks: list[str] = field(default_factory=list)


def build_suite(settings: EvaluateConfig, tokenizer: Tokenizer | None = None, max_length: int = 0) -> Suite:
    """The tasks that are asked for, with their sampling; all but those of ``retention``, which are lm-eval's.

    Args:
        settings: What is asked for.
        tokenizer: The model's; ``longcontext`` measures its texts with it.
        max_length: Most tokens that the model reads, for the same.

    Raises:
        InputError: For an unknown suite or task, a file that is missing (says which to put where) or cannot be used.
    """
    if settings.suite == "reasoning":
        suite = _reasoning(settings)
    elif settings.suite == "pocket":
        from prism_nemo.evaluation.suites.pocket import pocket_tasks

        suite = Suite("pocket", pocket_tasks(settings))
    elif settings.suite == "longcontext" and tokenizer is not None:
        lengths = settings.lengths or LENGTHS
        settings = dataclasses.replace(settings, lengths=lengths)
        suite = Suite("longcontext", _long_context(settings, tokenizer, max_length))
    elif settings.suite.endswith(ENDINGS):
        suite = _file(settings)
    else:
        check_suite_name(settings.suite)
        raise InputError(f"--suite {settings.suite}: its questions are not made without a model")
    tasks = [dataclasses.replace(task, sampling=settings.sampling(task.sampling)) for task in suite.tasks]
    for task in tasks:
        check_sampling(task.name, task.sampling)
    return dataclasses.replace(suite, tasks=tasks)


def check_suite_name(name: str) -> None:
    """Refuse a suite that there is none of.

    Raises:
        InputError: With those that there are.
    """
    if name not in SUITES and not name.endswith(ENDINGS):
        raise InputError(
            f"--suite '{name}' is unknown; choose {', '.join(SUITES)} or a file of questions ({', '.join(ENDINGS)})"
        )


def check_long_context(settings: EvaluateConfig, tokenizer: Tokenizer, max_length: int) -> None:
    """Refuse lengths that the model cannot read, without making the texts, which takes minutes.

    Raises:
        InputError: Naming the length, or a kind of question that is unknown.
    """
    lengths = settings.lengths or LENGTHS
    too_long = tuple(length for length in lengths if length > max_length)
    _long_context(dataclasses.replace(settings, lengths=too_long), tokenizer, max_length)


def _long_context(settings: EvaluateConfig, tokenizer: Tokenizer, max_length: int) -> list[EvaluationTask]:
    return long_context_tasks(
        tokenizer,
        max_length,
        settings.lengths,
        settings.tasks or tuple(KINDS),
        settings.questions or _LONG_QUESTIONS,
        settings.seed,
        settings.split,
        Path(settings.text) if settings.text else None,
    )


def asked_of(task: EvaluationTask, split: str, questions: int | None) -> list[Question]:
    """Questions of a split; where there are more than asked for, those whose hashes come first, in the task's order."""
    found = [question for question in task.questions if question.split == split]
    if questions is None or len(found) <= questions:
        return found
    kept = {question.id for question in sorted(found, key=lambda q: order_of(q.id))[:questions]}
    return [question for question in found if question.id in kept]


def order_of(id: str) -> str:
    """What questions are ordered by where some are picked: as good as random, and the same everywhere."""
    return hashlib.sha256(f"order/{id}".encode()).hexdigest()


def questions_hash(questions: Sequence[Question]) -> str:
    """SHA-256 of what is asked and what is right, whatever file it came from."""
    digest = hashlib.sha256()
    for question in questions:
        p = question.problem
        digest.update(repr((question.id, question.split, p.question, p.text, p.answer, p.verifier)).encode())
        digest.update(repr(sorted(p.metadata.items())).encode())
    return digest.hexdigest()


def _reasoning(settings: EvaluateConfig) -> Suite:
    names = settings.tasks or tuple(REASONING)
    for name in names:
        if name not in REASONING:
            raise InputError(f"--task: '{name}' is unknown; the suite has {', '.join(REASONING)}")
    tasks: list[EvaluationTask] = []
    marks: list[str] = []
    missing: list[str] = []
    for name in names:
        benchmark = REASONING[name]
        try:
            test = _found(settings.data, name, benchmark)
        except InputError as error:
            missing.append(str(error))
            continue
        questions, about = read_questions(test, find_file(test.parent, f"{name}.validation"), _defaults(benchmark))
        count = sum(question.split == "test" for question in questions)
        if count != benchmark.asked:
            marks.append(f"{name}: {count} questions; the study's scores are over {benchmark.asked}")
        about["sampling_of_ours"] = list(benchmark.ours)
        tasks.append(
            EvaluationTask(name, benchmark.domain, questions, benchmark.sampling, benchmark.formats, about=about)
        )
    if missing:
        have = f" Or ask only for what is there: {' '.join(f'--task {task.name}' for task in tasks)}." if tasks else ""
        raise InputError("\n".join(missing) + have)
    return Suite("reasoning", tasks, marks)


def _defaults(benchmark: Benchmark) -> dict[str, Any]:
    return {"reward": benchmark.reward, "domain": benchmark.domain}


def _found(data: str | None, name: str, benchmark: Benchmark) -> Path:
    """The benchmark's file, fetched from the Hub where it is not there and the Hub is."""
    if data is None:
        raise InputError(
            f"{name}: --data is needed: a folder with {name}.jsonl in it, whose rows have {benchmark.keys}; questions "
            "that are fetched from the Hub are saved there too"
        )
    folder = Path(data)
    path = find_file(folder, name)
    if path is not None:
        return path
    reason = fetch(benchmark.hub, folder / f"{name}.jsonl")
    if reason is None:
        return folder / f"{name}.jsonl"
    raise InputError(
        f"{name}: put its questions into {folder / name}.jsonl, a row each with {benchmark.keys} (docs/evaluation.md). "
        f"They are {benchmark.hub.id} on the Hub, which could not be used: {reason}."
    )


def _file(settings: EvaluateConfig) -> Suite:
    path = Path(settings.suite)
    if not path.is_file():
        raise InputError(f"--suite {path}: there is no such file")
    name = stem_of(path)
    if settings.tasks and settings.tasks != (name,):
        raise InputError(f"--task: {path} is one task, '{name}'")
    questions, about = read_questions(path, find_file(path.parent, f"{name}.validation"), splits="hash")
    domains = sorted({question.problem.domain for question in questions})
    domain = domains[0] if len(domains) == 1 else "general"
    code = any(question.problem.verifier == "code" for question in questions)
    formats = _CODE_FORMATS if code else _FORMATS
    return Suite(name, [EvaluationTask(name, domain, questions, formats=formats, about=about)])
