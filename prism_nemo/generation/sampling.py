"""Sampling responses to prompts with the same parameters for all: the engine behind one function."""

from __future__ import annotations

import torch

from prism_nemo.generation.engine import Engine
from prism_nemo.generation.requests import Request, Response, SamplingParams, request_seed
from prism_nemo.models.decoder import LanguageModel

__all__ = ["Response", "generate"]


def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    stop_id: int,
    temperature: float,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Response]:
    """Sample responses. Each prompt is read once, however many samples it gets.

    Args:
        model: The Megatron model, in any tensor- and pipeline-parallel layout; every rank of a model-parallel group
            must call this with the same arguments.
        prompts: Token ids; lengths may differ.
        samples_per_prompt: Responses to each prompt.
        max_new_tokens: Cut a response here.
        stop_id: Token that ends a response.
        temperature: 0 for greedy.
        top_p: Nucleus mass.
        generator: Gives the seed; in the same state on every rank of a model-parallel group.

    Returns:
        ``len(prompts) * samples_per_prompt`` responses; those of one prompt stand together.

    Raises:
        InputError: If a prompt leaves too little room for the response.
    """
    device = None if generator is None else generator.device
    base = int(torch.randint(2**62, (1,), generator=generator, device=device))
    requests: list[Request] = []
    for prompt in prompts:
        for _ in range(samples_per_prompt):
            sampling = SamplingParams(
                max_new_tokens, temperature, top_p, stop_ids=(stop_id,), seed=request_seed(base, len(requests))
            )
            requests.append(Request(prompt, sampling))
    return Engine(model).generate(requests)
