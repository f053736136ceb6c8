"""What is asked of the engine and what comes back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from prism_nemo.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """How one response is sampled.

    Attributes:
        max_new_tokens: Cut the response here.
        temperature: Divides the logits; 0 for greedy.
        top_p: Mass of the nucleus: the smallest set of likeliest tokens that reaches it.
        top_k: Only the likeliest `top_k` tokens; 0 for all. Applied before the nucleus, as in transformers.
        stop_ids: Tokens that end the response; the token is kept.
        stop_texts: Texts that end the response once they appear in it; needs the engine's `decode`.
        seed: Of the response's random numbers. The token at a place is a function of the seed, the place and the
            logits, whatever else is in the batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be sampled.

        Raises:
            InputError: Naming the field.
        """
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {self.max_new_tokens} is less than 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: {self.temperature} is not 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p} is not above 0 and at most 1 (1 for every token)")
        if self.top_k < 0:
            raise InputError(f"top_k: {self.top_k} is negative; 0 means every token")
        if not 0 <= self.seed < 2**128:
            raise InputError(f"seed: {self.seed} is not a number from 0 to 2^128 - 1; request_seed gives one")
        if "" in self.stop_texts:
            raise InputError("stop_texts: an empty text is in every response")


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        prompt: Token ids. Requests of the same prompt share one pass over it.
        sampling: How.
    """

    prompt: list[int]
    sampling: SamplingParams


def check_request(number: int, request: Request, positions: int, vocab_size: int) -> None:
    """Refuse a request that no engine can serve.

    Args:
        number: Of the request, for the message.
        request: The request.
        positions: Most tokens that the model can read.
        vocab_size: Of the model.

    Raises:
        InputError: Naming the request or its field.
    """
    request.sampling.check()
    prompt, new = len(request.prompt), request.sampling.max_new_tokens
    if prompt == 0:
        raise InputError(f"request {number}: an empty prompt; give it a token to begin with")
    if prompt + new > positions:
        raise InputError(
            f"a prompt of {prompt} tokens and max_new_tokens {new} do not fit the model's {positions} positions; lower "
            "max_new_tokens"
        )
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
        raise InputError(f"request {number}: a token outside the model's vocabulary of {vocab_size}")


@dataclass
class Response:
    """What the model wrote after one prompt.

    Attributes:
        prompt: Token ids of the prompt.
        tokens: Token ids of the response, the stop token included if it was reached.
        logprobs: Log-probability of each under the distribution that the trainer sees (temperature 1, no nucleus).
        finished: Whether a stop token or text was reached.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finished: bool


def request_seed(*place: int) -> int:
    """A seed from numbers that name a request: in RL (seed of the run, number of the prompt, place in the group).

    Nothing else decides it, so the same responses are sampled by any number of ranks and by a run that was resumed.
    Any two different places give unrelated streams, which ``seed + i`` does not promise.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, place)).encode()).digest()[:8], "big")


@dataclass
class Uniforms:
    """The uniform random numbers of one response: Philox with the seed as its key, drawn as they are needed.

    Attributes:
        seed: The key.
    """

    seed: int
    _drawn: list[float] = field(default_factory=list)
    _stream: np.random.Generator | None = None

    def at(self, place: int) -> float:
        """The number in [0, 1) for the token at `place`; places come in ascending order."""
        if self._stream is None:
            self._stream = np.random.Generator(np.random.Philox(key=self.seed))
        while place >= len(self._drawn):
            self._drawn += self._stream.random(64).tolist()
        return self._drawn[place]


class Sampler(Protocol):
    """Whatever writes responses: `prism_nemo.generation.engine.Engine`, or vLLM."""

    def generate(self, requests: list[Request]) -> list[Response]:
        """A response to each request, in their order, the same on every rank of the model-parallel group."""
        ...
