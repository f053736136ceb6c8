"""What the tests of engines run in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from prism_nemo.errors import PrismError
from prism_nemo.evaluation.engines.contract import Continuation, EvaluationModel, Likelihood
from prism_nemo.evaluation.engines.open import OpenedModel, find_model, load_model
from prism_nemo.generation.requests import Request, Response, SamplingParams
from prism_nemo.runtime import stop

Answers = tuple[list[Response], list[Likelihood]]


def everything(
    opened: OpenedModel, requests: list[Request], continuations: list[Continuation]
) -> tuple[list[Answers], dict[str, Any]]:
    """By rank what is answered and scored; and what the model says of itself."""
    model = opened.model
    own = model.generate(requests), model.score(continuations)
    everyone: list[Any] = [own]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, own)
    return everyone, {"engine": model.engine, "max_length": model.max_length, **opened.about}


def here(
    places: list[tuple[str, str, str | None]], requests: list[Request], continuations: list[Continuation]
) -> list[Answers]:
    """For each (path, engine, tokenizer) what is answered and scored, in one process."""
    found = []
    for path, engine, tokenizer in places:
        model = load_model(find_model(path, engine, tokenizer)).model
        found.append((model.generate(requests), model.score(continuations)))
    stop()
    return found


def said_and_stopped(
    opened: OpenedModel, calls: list[tuple[str, Any]], prompts: list[list[int]]
) -> tuple[list[str], list[tuple[Response, Response, str, int]]]:
    """What the model says to each (method, argument) that it refuses, of others how many answers; and `_stopped`."""
    found = []
    for name, argument in calls:
        method: Callable[[Any], Any] = getattr(opened.model, name)
        try:
            found.append(f"{len(method(argument))} answers")
        except PrismError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found, _stopped(opened.model, prompts)


def _stopped(model: EvaluationModel, prompts: list[list[int]]) -> list[tuple[Response, Response, str, int]]:
    """Free greedy responses; the same up to a text of two of their tokens; that text, and tokens up to its end."""
    found = []
    for free in model.generate([Request(prompt, SamplingParams(12, 0.0)) for prompt in prompts]):
        texts = [model.tokenizer.decode(free.tokens[place - 1 : place + 1]) for place in range(1, len(free.tokens))]
        place = next((i for i, text in enumerate(texts) if i > 1 and len(text) == 2 and texts.index(text) == i), None)
        if place is not None:
            sampling = SamplingParams(12, 0.0, stop_texts=("nowhere", texts[place]))
            found.append((free, model.generate([Request(free.prompt, sampling)])[0], texts[place], place + 2))
    return found
