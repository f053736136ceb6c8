"""A model without weights that writes what a test wants, and verifiers that misbehave."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.evaluation.engines.contract import Continuation, Likelihood
from prism_nemo.generation.requests import Request, Response
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import Verifier

END = "<eos>"


class Interrupted(Exception):
    """Stands for a kill between two calls."""


class FakeModel:
    """Answers by a function of the prompt's text and the request.

    Args:
        tokenizer: One token for each character.
        answer: Text after the prompt; with `END` where the model ends by itself.
        max_length: Most tokens.
        calls: Raise `Interrupted` instead of a further call.

    Attributes:
        requests: All that were served.
    """

    engine = "fake"

    def __init__(
        self,
        tokenizer: Tokenizer,
        answer: Callable[[str, Request], str],
        max_length: int = 4096,
        calls: int | None = None,
    ) -> None:
        self.tokenizer, self.max_length, self._answer, self._calls = tokenizer, max_length, answer, calls
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        if self._calls is not None:
            if self._calls == 0:
                raise Interrupted
            self._calls -= 1
        self.requests += requests
        return [self._respond(request) for request in requests]

    def _respond(self, request: Request) -> Response:
        sampling = request.sampling
        if len(request.prompt) + sampling.max_new_tokens > self.max_length:
            raise ValueError("a request that the model has no room for")
        ids = self.tokenizer.encode(self._answer(self.tokenizer.decode(request.prompt), request))
        written: list[int] = []
        for token in ids[: sampling.max_new_tokens]:
            written.append(token)
            text = self.tokenizer.decode(written)
            if token in sampling.stop_ids or any(stop in text for stop in sampling.stop_texts):
                return Response(request.prompt, written, [0.0] * len(written), True)
        return Response(request.prompt, written, [0.0] * len(written), False)

    def score(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        return [Likelihood(-2.0 * len(c.tokens), len(c.tokens), False) for c in continuations]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Raises(Verifier):
    """Raises on every answer."""

    name = "raises"
    isolated = False

    def verify(self, problem: Problem, answer: str) -> float:
        raise ZeroDivisionError(answer)


class Dies(Verifier):
    """Ends its process on "die"."""

    name = "dies"
    isolated = True

    def verify(self, problem: Problem, answer: str) -> float:
        if answer == "die":
            os._exit(3)
        return float(answer == problem.answer)
