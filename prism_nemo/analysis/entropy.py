"""`analyze entropy`: how sure models are, how long they write, and how likely they find right and wrong answers.

For each model (stage), on each task: entropy of the tokens that it samples, length, pass rate, the likelihood of its
own right and wrong answers, and the likelihood of the same given right and wrong answers for every model. On held-out
text: entropy and loss. Entropy is exact, over the whole vocabulary, at temperature 1 whatever the sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prism_nemo.analysis.loading import names_of
from prism_nemo.analysis.sampled import AnswerSettings, check_answers, questions_of, rate_of, sample_answers
from prism_nemo.analysis.token_entropy import Asked, Told, token_entropies
from prism_nemo.analysis.token_rows import TokenRows, check_rows, held_out_inputs
from prism_nemo.config import ParallelConfig
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines.open import architecture_of, read_model, tokenizer_of
from prism_nemo.evaluation.statistics.differences import token_mean
from prism_nemo.generation.engine import Engine
from prism_nemo.rl.rewards.task import CLOSE, OPEN, Problem
from prism_nemo.rl.rollout import Rollout
from prism_nemo.runtime import start, stop
from prism_nemo.runtime.launch import launch

# Their answer is a letter among shuffled options, or a program: no text to compare likelihoods of.
_WITHOUT_TEXT = ("choice", "code")


@dataclass(frozen=True)
class EntropySettings:
    """What is measured.

    Attributes:
        models: One or more checkpoints (native or Hugging Face), by stage.
        answers: Tasks and sampling.
        data: Folder of built data, for held-out text; None for none.
        sources: Of `data`; empty for all of weight 0.
        rows: Rows of each source.
        seq_length: Tokens of a row.
        tokenizer: The first model's own if not given.
        confidence: Of the intervals.
        slots: Answers that are written at a time.
    """

    models: tuple[str, ...]
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    data: str | None = None
    sources: tuple[str, ...] = ()
    rows: int = 256
    seq_length: int = 128
    tokenizer: str | None = None
    confidence: float = 0.95
    slots: int = 256


def analyze_entropy(settings: EntropySettings, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every model on the same questions and texts.

    Returns:
        ``models``, ``settings`` and ``rows``: ``model``, ``on`` (task or source), ``measure``, ``value``, ``low``,
        ``high`` (Student's t over questions or rows; None for fewer than two) and ``count`` (of these). The measures of
        a task: ``pass_rate``; ``length`` (tokens) and ``finished`` (share that ended by itself); ``entropy`` of the
        sampled tokens; ``nll_right`` and ``nll_wrong``, per token of the model's own answers; ``nll_answer`` and
        ``nll_other_answer``, per given answer, and ``margin``, the second less the first. Of text: ``entropy`` and
        ``loss``. All in nats.

    Raises:
        InputError: For settings, models or text that cannot be used; before any work.
        PrismError: If logits are not finite.
    """
    paths = [Path(model) for model in settings.models]
    if not paths:
        raise InputError("models: at least one checkpoint is needed")
    if settings.data is None and not settings.answers.tasks:
        raise InputError("nothing to measure: give tasks, or data (held-out text)")
    if not 0 < settings.confidence < 1:
        raise InputError(f"confidence: {settings.confidence} lies outside 0 to 1 (0.95 for 95 %)")
    check_answers(settings.answers)
    names, tokenizer = names_of(paths), tokenizer_of(paths[0], settings.tokenizer)
    inputs: list[TokenRows] = []
    if settings.data is not None:
        inputs = held_out_inputs(settings.data, settings.sources, settings.rows, settings.seq_length)
    for path in paths:
        architecture = architecture_of(path)
        if tokenizer.vocab_size > architecture.vocab_size:
            raise InputError(f"{tokenizer.path}: has {tokenizer.vocab_size} tokens, {path} {architecture.vocab_size}")
        check_rows(inputs, architecture.vocab_size, architecture.max_position_embeddings, str(path), 2)
        _check_lengths(settings.answers, tokenizer, architecture.max_position_embeddings, path)
    rows: list[dict[str, Any]] = []
    for name, path in zip(names, paths, strict=True):
        say(f"entropy of {name}")
        found = launch(_work, settings, str(path), str(tokenizer.path), inputs)
        rows += [{"model": name, **row} for row in found]
    models = [{"name": name, "path": str(path)} for name, path in zip(names, paths, strict=True)]
    return {"models": models, "settings": asdict(settings), "rows": rows}


def _check_lengths(answers: AnswerSettings, tokenizer: Tokenizer, positions: int, path: Path) -> None:
    """Refuse questions and given answers that a model cannot read, before any is asked."""
    for task in answers.tasks:
        problems = questions_of(answers, task)
        longest = max(len(ids) for ids in tokenizer.encode_batch([p.prompt for p in problems])) + answers.max_new_tokens
        given = [len(asked.tokens) - 1 for pair in given_answers(problems, tokenizer) for asked in pair]
        if max([longest, *given]) > positions:
            raise InputError(
                f"task {task}: {max([longest, *given])} tokens have to be read (the longest prompt with max_new_tokens "
                f"{answers.max_new_tokens}, or with its given answer), but {path} has {positions} positions"
            )


def _work(settings: EntropySettings, path: str, tokenizer_path: str, inputs: list[TokenRows]) -> list[dict[str, Any]]:
    """One model, in a process of its own."""
    runtime = start(ParallelConfig(), seed=0)
    try:
        model, tokenizer = (
            read_model(Path(path), runtime),
            tokenizer_of(Path(path), tokenizer_path),
        )
        engine = Engine(model, settings.slots, decode=tokenizer.decode)
        rows: list[dict[str, Any]] = []
        for task in settings.answers.tasks:
            answers = sample_answers(engine, tokenizer, settings.answers, task)
            flat = [rollout for own in answers for rollout in own]
            told = token_entropies(model, [_asked(rollout) for rollout in flat])
            groups = _grouped(answers, told)
            given = given_answers(questions_of(settings.answers, task), tokenizer)
            likely = token_entropies(model, [asked for pair in given for asked in pair])
            pairs = [(sum(a.nll), sum(b.nll)) for a, b in zip(likely[::2], likely[1::2], strict=True)]
            found = [
                *_of_answers(answers, groups, settings.confidence),
                *_of_given(pairs, settings.confidence),
            ]
            rows += [{"on": task, **row} for row in found]
        for item in inputs:
            read = token_entropies(model, [Asked(row, 1) for row in item.rows])
            for measure, values in (("entropy", [t.entropy for t in read]), ("loss", [t.nll for t in read])):
                rows.append({"on": item.name, **by_token(measure, values, settings.confidence)})
        return rows
    finally:
        stop()


def _asked(rollout: Rollout) -> Asked:
    prompt, tokens = rollout.response.prompt, rollout.response.tokens
    return Asked([*prompt, *tokens], len(prompt))


def _grouped(answers: Sequence[Sequence[Rollout]], told: Sequence[Told]) -> list[list[tuple[Rollout, Told]]]:
    """Answers by question, each with what the model says of its tokens."""
    rest = iter(told)
    return [[(rollout, next(rest)) for rollout in own] for own in answers]


def by_token(measure: str, values: Sequence[Sequence[float]], confidence: float) -> dict[str, Any]:
    """A row: the mean over all tokens, with an interval over the groups (questions or texts) that they stand in.

    Groups without tokens are left out.
    """
    kept = [group for group in values if len(group)]
    return _row(measure, [float(np.mean(group)) for group in kept], [float(len(group)) for group in kept], confidence)


def _row(measure: str, values: list[float], weights: list[float], confidence: float) -> dict[str, Any]:
    row: dict[str, Any] = {"measure": measure, "value": None, "low": None, "high": None, "count": len(values)}
    if len(values) == 1:
        row["value"] = values[0]
    elif values:
        mean = token_mean(values, weights, confidence)
        row.update(value=mean.estimate, low=mean.low, high=mean.high)
    return row


def _of_answers(
    answers: Sequence[Sequence[Rollout]], groups: Sequence[Sequence[tuple[Rollout, Told]]], confidence: float
) -> list[dict[str, Any]]:
    """What is said of a model's own answers to a task."""
    rate = rate_of(answers, confidence)
    rows = [
        {"measure": "pass_rate", **{k: rate[k] for k in ("value", "low", "high")}, "count": len(answers)},
    ]
    each = [1.0] * len(groups)
    lengths = [float(np.mean([len(r.response.tokens) for r, _ in own])) for own in groups]
    ended = [float(np.mean([r.response.finished for r, _ in own])) for own in groups]
    rows += [_row("length", lengths, each, confidence), _row("finished", ended, each, confidence)]
    rows.append(by_token("entropy", [[h for _, told in own for h in told.entropy] for own in groups], confidence))
    for measure, right in (("nll_right", True), ("nll_wrong", False)):
        values = [[v for r, told in own if r.score.right is right for v in told.nll] for own in groups]
        rows.append(by_token(measure, values, confidence))
    return rows


def _of_given(pairs: Sequence[tuple[float, float]], confidence: float) -> list[dict[str, Any]]:
    """Likelihood of given right and wrong answers, per answer."""
    each = [1.0] * len(pairs)
    return [
        _row("nll_answer", [right for right, _ in pairs], each, confidence),
        _row("nll_other_answer", [wrong for _, wrong in pairs], each, confidence),
        _row("margin", [wrong - right for right, wrong in pairs], each, confidence),
    ]


def given_answers(problems: Sequence[Problem], tokenizer: Tokenizer) -> list[tuple[Asked, Asked]]:
    """For each question its right answer, and the right answer of another question, after the same beginning.

    The beginning is the prompt, and where that opens the thinking the worked answer (empty where there is none) and the
    end of the thinking. The other answer is that of the next question whose answer differs, so that right and wrong
    answers are the same texts on the whole, and a model gains nothing by what answers look like. Beginning and answer
    are encoded apart. Questions without a text as their answer are left out.

    Args:
        problems: Of one task.
        tokenizer: Of the model.
    """
    usable = [problem for problem in problems if problem.answer and problem.verifier not in _WITHOUT_TEXT]
    pairs = []
    for place, problem in enumerate(usable):
        following = usable[place + 1 :] + usable[:place]
        other = next((p.answer for p in following if p.answer != problem.answer), None)
        if other is None:
            continue
        opened = problem.prompt.rstrip().endswith(OPEN)
        context = tokenizer.encode(f"{problem.prompt}{problem.work}{CLOSE}" if opened else problem.prompt)
        right, wrong = (Asked([*context, *tokenizer.encode(text)], len(context)) for text in (problem.answer, other))
        pairs.append((right, wrong))
    return pairs


def entropy_lines(result: dict[str, Any]) -> list[str]:
    """A line for each value."""
    lines = []
    for row in result["rows"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.4f}"
        if row["low"] is not None:
            value += f" [{row['low']:.4f}, {row['high']:.4f}]"
        lines.append(f"{row['model']:<24} {row['on']:<16} {row['measure']:<17} {value}  n={row['count']}")
    return lines
