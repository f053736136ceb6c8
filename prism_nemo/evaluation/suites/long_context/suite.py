"""The suite: every kind of task at every length, as `EvaluationTask`s of the domain long_context."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.question import AskedSampling, EvaluationTask, Question
from prism_nemo.evaluation.suites.long_context.counting import CommonWords, FrequentWords
from prism_nemo.evaluation.suites.long_context.filler import Filler, read_sentences
from prism_nemo.evaluation.suites.long_context.fitting import SLACK, fit
from prism_nemo.evaluation.suites.long_context.kinds import Facts, Hops, Kind, Needle
from prism_nemo.rl.rewards.task import Problem

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Needle("needle_single"),
        Needle("needle_multikey", others=7),
        Needle("needle_multivalue", values=4),
        Hops(),
        CommonWords(),
        FrequentWords(),
        Facts(),
    )
}
VERIFIER = "prism_nemo.evaluation.suites.long_context.verifier:PartsVerifier"
# Tokens that an engine may put before a prompt: a first token, and one to spare.
_BEFORE = 2
# Where the answer is over: a base model goes on with a question of its own.
_STOPS = ("\n\n", "\nQuestion:")


def long_context_tasks(
    tokenizer: Tokenizer,
    max_length: int,
    lengths: Sequence[int] = LENGTHS,
    kinds: Sequence[str] = tuple(KINDS),
    questions: int = 50,
    seed: int = 0,
    split: str = "test",
    text: Path | None = None,
) -> list[EvaluationTask]:
    """The tasks, shortest first.

    Args:
        tokenizer: The checkpoint's, which lengths are measured with.
        max_length: Most tokens that the model can read.
        lengths: Tokens of prompt and answer together; no prompt is longer, or more than 2 % shorter.
        kinds: Names of `KINDS`.
        questions: Of each task. What is asked for lies at depths spread evenly over the text.
        seed: Of everything; the same for every model that is to be compared.
        split: validation or test: different questions.
        text: File whose sentences are the filler, such as held-out text; None for built-in sentences.

    Raises:
        InputError: A length is beyond the model or too short for a task, or a kind is unknown.
    """
    if questions < 1:
        raise InputError(f"questions: {questions} must be at least 1")
    unknown = [name for name in kinds if name not in KINDS]
    if unknown:
        raise InputError(f"long-context task '{unknown[0]}' is unknown; known: {', '.join(KINDS)}")
    too_long = [length for length in lengths if length > max_length]
    if too_long:
        fitting = [length for length in lengths if length <= max_length]
        advice = f"ask for {', '.join(map(str, fitting))}" if fitting else "ask for shorter ones"
        raise InputError(
            f"length {too_long[0]}: the model reads at most {max_length} tokens; {advice}, or extend the model first"
        )
    sentences = read_sentences(text) if text is not None else None
    return [
        _task(KINDS[name], tokenizer, length, questions, f"{seed}/{split}", split, sentences)
        for length in sorted(lengths)
        for name in kinds
    ]


def _task(
    kind: Kind,
    tokenizer: Tokenizer,
    length: int,
    questions: int,
    seed: str,
    split: str,
    sentences: tuple[str, ...] | None,
) -> EvaluationTask:
    name = f"{kind.name}_{length // 1024}k" if length % 1024 == 0 else f"{kind.name}_{length}"
    return EvaluationTask(
        name=name,
        domain="long_context",
        questions=[
            _question(kind, tokenizer, length, f"{seed}/{name}/{number}", (number + 0.5) / questions, split, sentences)
            for number in range(questions)
        ],
        sampling=AskedSampling(max_new_tokens=kind.answer_tokens, stop_texts=_STOPS),
        formats=("plain",),
        about={
            "length": length,
            "tokenizer_sha256": tokenizer.sha256,
            "filler": "built-in sentences" if sentences is None else "sentences of a file",
        },
    )


def _question(
    kind: Kind,
    tokenizer: Tokenizer,
    length: int,
    seed: str,
    depth: float,
    split: str,
    sentences: tuple[str, ...] | None,
) -> Question:
    rng = random.Random(seed)
    around = kind.answer_tokens + _BEFORE
    hidden = kind.hide(rng, depth, length - around)
    filler = Filler(rng, sentences)
    prompt = fit(
        lambda units, short: kind.render(hidden, filler, units, short),
        lambda text: len(tokenizer.encode(text)),
        budget=length - around,
        least=math.ceil((1 - SLACK) * length) - around,
        what=f"{kind.name} at {length} tokens",
    )
    judging = dict(hidden.judging)
    if "candidates" in judging:  # only what is in the text could be meant
        judging["candidates"] = sorted(set(judging["candidates"]).intersection(re.findall(r"\w+", prompt)))
    problem = Problem(
        task=kind.name,
        question=prompt,
        work="",
        answer=", ".join(hidden.parts),
        metadata={"parts": list(hidden.parts), "depth": depth, **judging},
        domain="long_context",
        verifier=VERIFIER,
        text=prompt,
    )
    # The text depends on the tokenizer; two models with different ones must not seem to have answered the same.
    return Question(f"{kind.name}/{hashlib.sha256(prompt.encode()).hexdigest()[:16]}", split, problem)
