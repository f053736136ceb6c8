"""Loss on held-out text of each source of built data, row by row, so that models can be compared row by row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prism_nemo.data.held_out import HeldOut
from prism_nemo.data.manifest import Manifest, load_manifest
from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.engines.contract import Continuation, EvaluationModel
from prism_nemo.evaluation.result import QuestionResult, TaskScore
from prism_nemo.evaluation.statistics.differences import token_mean

DOMAIN, METRIC = "text", "loss"


@dataclass(frozen=True)
class SourceLoss:
    """A source in the layout of a result.

    Attributes:
        score: metric "loss", in nats per token, with its interval over rows; the perplexity is in `details`.
        rows: metrics ``loss`` (nats per token of the row) and ``tokens`` (how many were scored), and no answers. `gold`
            is a hash of the row's token ids, so that rows of different text are never compared.
    """

    score: TaskScore
    rows: list[QuestionResult]


def task_name(source: str) -> str:
    """Under which a source stands among the tasks of an evaluation."""
    return f"held_out_{source}"


def held_out_sources(data: str | Path) -> list[str]:
    """Names of the sources of weight 0 of a build, which no run trains on.

    Raises:
        InputError: No build there, or one without held-out sources.
    """
    manifest = load_manifest(data)
    names = [source.name for source in manifest.sources if source.weight == 0]
    if not names:
        raise InputError(f"{data}: no source has weight 0, so no text was held out; name the sources to be measured")
    return names


def check_held_out(
    data: str | Path, sources: Sequence[str], rows: int, seq_length: int, max_length: int, tokenizer: Tokenizer
) -> None:
    """Refuse what cannot be measured, before a model is asked.

    Args:
        data: Folder of built data.
        sources: Names in it.
        rows: Of each.
        seq_length: Tokens scored in a row.
        max_length: Most tokens that the model can read.
        tokenizer: The model's.

    Raises:
        InputError: Naming the source or the number.
    """
    if not 1 <= seq_length <= max_length:
        raise InputError(
            f"held-out text: rows of {seq_length} tokens, but the model reads 1 to {max_length}; use another seq_length"
        )
    if rows < 2:
        raise InputError(f"held-out text: {rows} row has no interval; use at least 2 rows")
    _check_tokens(load_manifest(data), tokenizer)
    for source in sources:
        HeldOut(data, source, seq_length, rows)


def _check_tokens(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Refuse tokens that mean something else to the model: their loss would be a number like any other.

    A tokenizer that was saved anew is another file with the same tokens, so those are compared where the hashes differ.
    """
    built = manifest.tokenizer
    if tokenizer.sha256 == built.sha256:
        return
    same = tokenizer.vocab_size == built.vocab_size and Path(built.path).is_file()
    if same:
        other = load_tokenizer(built.path)
        same = other.sha256 == built.sha256 and all(
            tokenizer.decode([i]) == other.decode([i]) for i in range(built.vocab_size)
        )
    if not same:
        raise InputError(
            f"{manifest.dir}: was built with the tokenizer {built.path} ({built.vocab_size} tokens), which is not the "
            f"model's, {tokenizer.path} ({tokenizer.vocab_size} tokens), or is not there to compare with; build the "
            "text with the model's tokenizer"
        )


def measure_held_out(
    model: EvaluationModel,
    data: str | Path,
    sources: Sequence[str],
    rows: int = 256,
    seq_length: int = 128,
    batch: int = 64,
) -> dict[str, SourceLoss]:
    """The loss of a model on evenly spaced rows of held-out sources; every rank calls this.

    Rows are running text, as in `HeldOut.text`: the borders of documents are not treated apart. The first token of a
    row is given and all `seq_length` after it are scored.

    Args:
        model: Asked by `score`.
        data: Folder of built data.
        sources: Names in it.
        rows: Of each source, the same ones for every model.
        seq_length: Tokens scored in a row.
        batch: Rows handed to the model at a time.

    Returns:
        By `task_name`.

    Raises:
        InputError: As `check_held_out`.
        PrismError: A likelihood that is not finite, or not of as many tokens as asked for.
    """
    check_held_out(data, sources, rows, seq_length, model.max_length, model.tokenizer)
    found = {}
    for source in sources:
        tokens, labels = HeldOut(data, source, seq_length, rows).text()
        asked = [Continuation([int(given[0])], scored.tolist()) for given, scored in zip(tokens, labels, strict=True)]
        results: list[QuestionResult] = []
        for first in range(0, rows, batch):
            for item in model.score(asked[first : first + batch]):
                place = len(results)
                if not math.isfinite(item.logprob) or item.tokens != seq_length:
                    raise PrismError(
                        f"held-out text {source!r}, row {place}: log-probability {item.logprob} of {item.tokens} "
                        f"tokens, where {seq_length} were asked for"
                    )
                metrics = {METRIC: -item.logprob / item.tokens, "tokens": float(item.tokens)}
                results.append(QuestionResult(f"row-{place}", "test", "", _hash(asked[place]), [], metrics=metrics))
        found[task_name(source)] = SourceLoss(source_score(results), results)
    return found


def _hash(row: Continuation) -> str:
    return hashlib.sha256(np.array([*row.context, *row.tokens], "<i8").tobytes()).hexdigest()[:16]


def source_score(rows: Sequence[QuestionResult]) -> TaskScore:
    """The score that rows amount to: nats per token, with Student's t over rows.

    Neighbouring rows may come from one long document; they count as independent all the same.
    """
    interval = token_mean([row.metrics[METRIC] for row in rows], [row.metrics["tokens"] for row in rows])
    # The exponential keeps the order of the ends; a loss so large that it overflows has no perplexity worth a number.
    perplexity = {
        name: math.exp(value) if value < 700 else None
        for name, value in (("estimate", interval.estimate), ("low", interval.low), ("high", interval.high))
    }
    tokens = int(sum(row.metrics["tokens"] for row in rows))
    details = {"perplexity": perplexity, "tokens": tokens, "interval": "Student's t over rows"}
    return TaskScore(
        DOMAIN,
        METRIC,
        interval.estimate,
        interval.low,
        interval.high,
        len(rows),
        higher_is_better=False,
        details=details,
    )
