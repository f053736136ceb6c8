"""What a stage's small evaluation asks, with nothing left open, and what is refused of it before training starts."""

from __future__ import annotations

from dataclasses import dataclass

from prism_nemo.config import InTrainingConfig, ParallelConfig
from prism_nemo.data.held_out import held_out_rows
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture
from prism_nemo.rl.rewards.judge import GATES
from prism_nemo.rl.rewards.task import Problem, task_named

MODES = ("ranks", "process")
SEED = 7
"""Of the questions and of sampled answers: no part of a run's seed, so that curves of two runs can be compared."""


@dataclass(frozen=True)
class Suite:
    """What is asked, with nothing left open; picklable, for the process that evaluates checkpoints.

    Attributes:
        data: Folder of built data; None without sources.
        sources: Held-out sources.
        rows: Of each.
        seq_length: Tokens of a row.
        tasks: Names.
        questions: Of each.
        max_new_tokens: Longest answer.
        temperature: 0 for greedy.
        gate: Required form of an answer.
        tokenizer: Folder or file; None without tasks.
    """

    data: str | None
    sources: list[str]
    rows: int
    seq_length: int
    tasks: list[str]
    questions: int
    max_new_tokens: int
    temperature: float
    gate: str
    tokenizer: str | None


def resolve_suite(
    config: InTrainingConfig,
    architecture: Architecture,
    parallel: ParallelConfig,
    data: str | None = None,
    seq_length: int | None = None,
    tokenizer: str | None = None,
    fp8: bool = False,
) -> Suite | None:
    """What the stage's configuration asks for; everything that can be refused is refused here.

    Args:
        config: The stage's.
        architecture: Of the model.
        parallel: Its layout in training.
        data: Built data of the stage, used where the configuration names none.
        seq_length: Of the stage, likewise.
        tokenizer: Of the stage, likewise.
        fp8: Whether the stage computes in FP8.

    Returns:
        The suite, or None where nothing is to be evaluated.

    Raises:
        InputError: Naming the key and what would work.
    """
    if config.every < 0:
        raise InputError(f"evaluation.every: {config.every} must be 0 (never) or more")
    if config.every == 0:
        return None
    if config.mode not in MODES:
        raise InputError(f"evaluation.mode: '{config.mode}' is unknown; choose one of {', '.join(MODES)}")
    for name in ("rows", "questions", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise InputError(f"evaluation.{name}: {getattr(config, name)} must be at least 1")
    if not (config.sources or config.tasks):
        raise InputError("evaluation: names neither sources nor tasks; name some, or set evaluation.every to 0")
    positions_ = architecture.max_position_embeddings
    length = config.seq_length or seq_length or 0
    if config.sources:
        _check_rows(config, length, positions_, parallel, data)
    found_tokenizer = config.tokenizer or tokenizer
    suite = Suite(
        config.data or data,
        list(config.sources),
        config.rows,
        length,
        list(config.tasks),
        config.questions,
        config.max_new_tokens,
        config.temperature,
        config.gate,
        found_tokenizer,
    )
    for source in suite.sources:
        held_out_rows(suite.data or "", source, suite.seq_length, suite.rows)
    if suite.tasks:
        _check_tasks(config, suite, architecture, parallel, fp8)
    return suite


def _check_rows(
    config: InTrainingConfig, length: int, positions_: int, parallel: ParallelConfig, data: str | None
) -> None:
    if not (config.data or data):
        raise InputError("evaluation.data: name the folder of built data that evaluation.sources are in")
    if not 1 <= length <= positions_:
        raise InputError(f"evaluation.seq_length: {length} must lie in 1 to the model's {positions_} positions")
    shared = parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    if config.mode == "ranks" and length % shared:
        raise InputError(f"evaluation.seq_length: {length} must be a multiple of the {shared} ranks that share a row")
    if config.mode == "ranks" and parallel.virtual_pipeline_model_parallel_size > 1:
        raise InputError("evaluation.mode: with a virtual pipeline checkpoints are evaluated by mode=process")


def _check_tasks(
    config: InTrainingConfig, suite: Suite, architecture: Architecture, parallel: ParallelConfig, fp8: bool
) -> None:
    if config.mode == "ranks":
        split = parallel.context_parallel_size > 1 or parallel.virtual_pipeline_model_parallel_size > 1
        if split or fp8:
            what = "FP8" if fp8 else "context parallelism or a virtual pipeline"
            raise InputError(
                f"evaluation.tasks: answers are not sampled from a model that trains with {what}; use "
                "evaluation.mode=process, which evaluates checkpoints, or evaluation.sources alone"
            )
    if suite.tokenizer is None:
        raise InputError("evaluation.tokenizer: name the tokenizer that evaluation.tasks are asked with")
    if not 0 <= config.temperature < float("inf"):
        raise InputError(f"evaluation.temperature: {config.temperature} must be 0 (greedy) or more")
    if config.gate not in GATES:
        raise InputError(f"evaluation.gate: '{config.gate}' is unknown; choose one of {', '.join(GATES)}")
    tokenizer = load_tokenizer(suite.tokenizer)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"evaluation.tokenizer {suite.tokenizer}: {tokenizer.vocab_size} tokens, but the model has "
            f"{architecture.vocab_size}"
        )
    room = architecture.max_position_embeddings - config.max_new_tokens
    for name, problems in questions_of(suite).items():
        longest = max((len(tokenizer.encode(problem.prompt)) for problem in problems), default=0)
        if not 0 < longest <= room:
            raise InputError(
                f"evaluation.tasks: {name} has prompts of up to {longest} tokens, and evaluation.max_new_tokens leaves "
                f"{room} of the model's {architecture.max_position_embeddings} positions"
            )


def questions_of(suite: Suite) -> dict[str, list[Problem]]:
    """The questions of each task."""
    return {name: task_named(name).distinct(suite.questions, "validation", SEED) for name in suite.tasks}
