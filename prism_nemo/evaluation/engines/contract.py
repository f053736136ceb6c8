"""What an evaluation asks of a model, whichever engine runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.generation.requests import Request, Response


@dataclass(frozen=True)
class Continuation:
    """A text whose probability is asked for.

    Attributes:
        context: Token ids that are given; at least one.
        tokens: Token ids that are scored; at least one.
    """

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
        logprob: Sum of its tokens' log-probabilities, in nats.
        tokens: How many tokens were scored.
        greedy: Whether each of them was the model's first choice.
    """

    logprob: float
    tokens: int
    greedy: bool


class EvaluationModel(Protocol):
    """A model that an evaluation can ask. Every rank of a parallel run calls it with the same arguments.

    Attributes:
        engine: megatron, transformers or vllm.
        tokenizer: Of the checkpoint.
        max_length: Most tokens that the model can read, the answer included.
    """

    engine: str
    tokenizer: Tokenizer
    max_length: int

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """A response to each request, in their order."""

    def score(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        """How likely each continuation is, in their order. Contexts that begin alike are read once."""
