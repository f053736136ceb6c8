"""What all engines do with continuations before and after the model: cut, check, add up."""

from __future__ import annotations

from collections.abc import Sequence

from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines.contract import Continuation, Likelihood
from prism_nemo.generation.score import Row, Scored


def rows_of(continuations: Sequence[Continuation], max_length: int, vocab_size: int) -> list[Row]:
    """Rows that the model can read, cut as lm-eval cuts them: from the left, the continuation kept whole.

    The last token of a row is scored but not read, so that a row may have one token more than the model reads
    (``lm_eval.models.huggingface.HFLM._loglikelihood_tokens``).

    Args:
        continuations: What is asked.
        max_length: Most tokens that the model reads.
        vocab_size: Of the model.

    Raises:
        InputError: For an empty context or continuation, one that is too long even without its context, or a token
            that the model does not have.
    """
    rows = []
    for number, (context, tokens) in enumerate((list(c.context), list(c.tokens)) for c in continuations):
        if not context or not tokens:
            what = "context" if not context else "continuation"
            raise InputError(f"continuation {number}: an empty {what}; give it one token at least")
        if len(tokens) > max_length:
            raise InputError(
                f"continuation {number}: {len(tokens)} tokens are to be scored, but the model reads {max_length}; "
                "score a long text in windows"
            )
        whole = context + tokens
        if not 0 <= min(whole) <= max(whole) < vocab_size:
            raise InputError(f"continuation {number}: a token outside the model's vocabulary of {vocab_size}")
        whole = whole[-(max_length + 1) :]
        rows.append(Row(whole, len(whole) - len(tokens)))
    return rows


def likelihood(scored: Scored) -> Likelihood:
    """A row's answer as the evaluation wants it."""
    return Likelihood(sum(scored.logprobs), len(scored.logprobs), scored.greedy)
