"""What the generation tests run in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from prism_nemo.checkpoint.convert import load_hf_weights
from prism_nemo.checkpoint.hf import HFReader
from prism_nemo.config import ParallelConfig
from prism_nemo.generation.engine import Engine
from prism_nemo.generation.requests import Request, Response, SamplingParams, request_seed
from prism_nemo.models.build import build_model
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.family import read_hf_config
from prism_nemo.models.forward import forward_logits
from prism_nemo.runtime import Runtime, start, stop


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
    """Sample responses with the same parameters for all.

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


def load_model(hf_dir: str, runtime: Runtime) -> LanguageModel:
    """The Megatron model of a Hugging Face folder, this rank's part."""
    architecture = read_hf_config(Path(hf_dir))
    model = build_model(architecture, runtime)
    load_hf_weights(model, architecture, HFReader(Path(hf_dir)), runtime.parallel.tensor_model_parallel_size)
    return model


def _compare(model: LanguageModel, response: Response, greedy: bool) -> dict[str, Any]:
    """Every token of a response against one full forward of `GPT` over prompt and response.

    Returns:
        Wrong tokens (greedy only), largest log-probability difference, and the smallest lead of the best logit.
    """
    row = response.prompt + response.tokens
    logits = forward_logits(model, torch.tensor([row[:-1]]))
    assert logits is not None
    scores = logits[0, len(response.prompt) - 1 :, : model.architecture.vocab_size].log_softmax(-1)
    best = scores.topk(2).values
    written = torch.tensor(response.tokens)
    own = scores.gather(-1, written[:, None])[:, 0]
    return {
        "wrong": int((scores.argmax(-1) != written).sum()) if greedy else 0,
        "logprob_diff": (own - torch.tensor(response.logprobs)).abs().max().item(),
        "lead": (best[:, 0] - best[:, 1]).min().item(),
    }


def against_full_forward(
    hf_dirs: list[str], parallel: ParallelConfig, prompts: list[list[int]], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy and sampled responses of several models, each compared with full forwards of the same model.

    The stop token is one that the model writes: the eighth that it would write after the first prompt.
    """
    results = []
    runtime = start(parallel, seed=0)  # once: a process of several cannot join a second group
    for hf_dir in hf_dirs:
        model = load_model(hf_dir, runtime)
        stop_id = lengths(model, prompts, 8, 1)[0].tokens[-1]
        found: dict[str, Any] = {"stop": stop_id, "tokens": [], "alone": []}
        for mode, temperature, samples in (("greedy", 0.0, 1), ("sampled", 1.0, 3), ("hot", 1.7, 2)):
            responses = generate(
                model,
                prompts,
                samples_per_prompt=samples,
                max_new_tokens=max_new_tokens,
                stop_id=stop_id,
                temperature=temperature,
                top_p=0.9 if mode == "hot" else 1.0,
                generator=torch.Generator().manual_seed(4),
            )
            compared = [_compare(model, r, mode == "greedy") for r in responses]
            found[mode] = {
                "count": len(responses),
                "wrong": sum(c["wrong"] for c in compared),
                "logprob_diff": max(c["logprob_diff"] for c in compared),
                "lead": min(c["lead"] for c in compared),
                "prompts": [r.prompt for r in responses],
                "lengths": [len(r.tokens) for r in responses],
                "finished": [r.finished for r in responses],
                "ends": [r.tokens[-1] for r in responses],
                "stops_inside": sum(t == stop_id for r in responses for t in r.tokens[:-1]),
            }
            if mode == "greedy":
                found["tokens"] = [r.tokens for r in responses]
                found["logprobs"] = [r.logprobs for r in responses]
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            for prompt in prompts:
                (response,) = generate(
                    model,
                    [prompt],
                    samples_per_prompt=1,
                    max_new_tokens=max_new_tokens,
                    stop_id=stop_id,
                    temperature=0.0,
                )
                found["alone"].append((response.tokens, response.logprobs))
        results.append(found)
    stop()
    return results


def in_one_process(hf_dir: str, work: Callable[..., Any], *args: Any) -> Any:
    """``work(model, *args)`` on the whole model."""
    model = load_model(hf_dir, start(ParallelConfig(), seed=0))
    result = work(model, *args)
    stop()
    return result


def repeats(model: LanguageModel, prompts: list[list[int]], samples: int) -> tuple[list[Any], list[Any]]:
    """Samples asked for by number, and by repeating the prompts, from generators in the same state."""

    def tokens(rows: list[list[int]], count: int) -> list[Any]:
        generator = torch.Generator().manual_seed(11)
        responses = generate(
            model, rows, samples_per_prompt=count, max_new_tokens=12, stop_id=1, temperature=1.0, generator=generator
        )
        return [(r.prompt, r.tokens, r.finished) for r in responses]

    return tokens(prompts, samples), tokens([p for p in prompts for _ in range(samples)], 1)


def first_tokens(
    model: LanguageModel, prompt: list[int], count: int, temperature: float, top_p: float
) -> tuple[Any, Any]:
    """How often each token came first, and the logits it was drawn from by a full forward."""
    responses = generate(
        model,
        [prompt],
        samples_per_prompt=count,
        max_new_tokens=1,
        stop_id=1,
        temperature=temperature,
        top_p=top_p,
        generator=torch.Generator().manual_seed(8),
    )
    logits = forward_logits(model, torch.tensor([prompt]))
    assert logits is not None
    vocab = model.architecture.vocab_size
    return torch.bincount(torch.tensor([r.tokens[0] for r in responses]), minlength=vocab), logits[0, -1, :vocab]


def lengths(model: LanguageModel, prompts: list[list[int]], max_new_tokens: int, stop_id: int) -> list[Response]:
    """Greedy responses."""
    return generate(
        model, prompts, samples_per_prompt=1, max_new_tokens=max_new_tokens, stop_id=stop_id, temperature=0.0
    )


def stopped_at_each_place(
    model: LanguageModel, prompts: list[list[int]], count: int
) -> tuple[Any, dict[int, Response], Any]:
    """Free responses; the first one again with each of its tokens as the stop token; and responses of one token."""
    free = lengths(model, prompts, count, 0)
    tokens = free[0].tokens
    places = [place for place in range(count) if tokens[place] not in tokens[:place]]
    stopped = {place: lengths(model, prompts, count, tokens[place])[0] for place in places}
    return free, stopped, lengths(model, prompts, 1, 0)
