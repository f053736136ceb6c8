"""Sampling responses to prompts: temperature, nucleus, stop token, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prism_nemo.errors import InputError
from prism_nemo.generation.decode import Decoder
from prism_nemo.models.decoder import LanguageModel


@dataclass
class Response:
    """What the model wrote after one prompt.

    Attributes:
        prompt: Token ids of the prompt.
        tokens: Token ids of the response, the stop token included if it was reached.
        logprobs: Log-probability of each under the distribution that the trainer sees (temperature 1, no nucleus).
        finished: Whether the stop token was reached.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finished: bool


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits with everything outside the smallest set of mass `top_p` set to minus infinity."""
    ordered, order = logits.sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    # The token that crosses top_p is kept, so at least one always is.
    drop = mass - ordered.softmax(dim=-1) >= top_p
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


@torch.inference_mode()
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
    """Sample responses. Each prompt is read once, however many samples it gets; finished rows leave the batch.

    Args:
        model: The Megatron model, in any tensor-parallel layout; every tensor-parallel rank must call this with the
            same arguments and a generator in the same state.
        prompts: Token ids; lengths may differ.
        samples_per_prompt: Responses to each prompt.
        max_new_tokens: Cut a response here.
        stop_id: Token that ends a response.
        temperature: 0 for greedy.
        top_p: Nucleus mass.
        generator: Random numbers.

    Returns:
        ``len(prompts) * samples_per_prompt`` responses; those of one prompt stand together.

    Raises:
        InputError: If a prompt leaves too little room for the response.
    """
    decoder = Decoder(model)
    device = decoder.embedding.device
    longest = max(len(p) for p in prompts)
    positions = model.architecture.max_position_embeddings
    if longest + max_new_tokens > positions:
        raise InputError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} do not fit the model's {positions} "
            "positions; lower max_new_tokens"
        )
    tokens = torch.full((len(prompts), longest), stop_id)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
    offsets = torch.tensor([longest - len(p) for p in prompts], device=device)
    logits = decoder.prefill(tokens.to(device), offsets, max_new_tokens)
    if samples_per_prompt > 1:
        repeat = torch.arange(len(prompts), device=device).repeat_interleave(samples_per_prompt)
        decoder.select(repeat)
        logits, offsets = logits[repeat], offsets[repeat]
    count = len(prompts) * samples_per_prompt
    written = torch.full((count, max_new_tokens), stop_id, device=device)
    scores = torch.zeros((count, max_new_tokens), device=device)
    lengths = torch.full((count,), max_new_tokens, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    active = torch.arange(count, device=device)  # which response each row of the batch is
    for t in range(max_new_tokens):
        logprobs = logits.log_softmax(dim=-1)
        if temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            scaled = logprobs if temperature == 1 else logits / temperature
            if top_p < 1:
                scaled = _nucleus(scaled, top_p)
            chosen = torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]
        written[active, t] = chosen
        scores[active, t] = logprobs.gather(-1, chosen[:, None])[:, 0]
        ended = chosen == stop_id
        lengths[active[ended]] = t + 1
        finished[active[ended]] = True
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0 or t + 1 == max_new_tokens:
            break
        if len(going) < len(active):
            decoder.select(going)
            active, chosen, offsets = active[going], chosen[going], offsets[going]
        logits = decoder.step(chosen, longest + t, offsets)
    rows, ends = written.tolist(), lengths.tolist()
    values, done = scores.tolist(), finished.tolist()
    return [
        Response(prompts[i // samples_per_prompt], rows[i][: ends[i]], values[i][: ends[i]], done[i])
        for i in range(count)
    ]
