"""Generated tokens/s of the rollout engine and of transformers' `generate`, interleaved in one process.

    python benchmarks/rollout.py [--json] [--rounds 3] [--requests 512] [--samples 1] [--cases dense hybrid]
                                 [--dtypes fp32 bf16] [--peer-batches 32 64 128 256]

The same weights, the same prompts of 32 tokens, greedy; with `--temperature 1` sampled on both sides, as rollouts of
RL are. Response lengths are drawn from 8 to 128 and forced on both sides: ours by each request's max_new_tokens, the
peer's by a stopping criterion per row, so that a batch runs until its longest row ends, as it does with an end token.
Only tokens up to each row's end count, for both. The peer gets the best of its batch sizes and caches, found first on
its own; ours runs with one setting. A rate is per second of the processor's time, which other work on the machine
distorts less than that of the clock; a figure is the median of the ratios per round. One thread. Prompts all differ;
with `--samples 8` each is answered eight times, as in GRPO, which ours reads once.

- `dense`: Llama-shaped, 8.9M parameters.
- `hybrid`: Nemotron-H-shaped, 8.6M parameters: Mamba-2, attention and MLP layers.

What bounds greedy `dense` in fp32 (one core of a shared EPYC 9004; 512 requests, 9.4 s by thread time, 13.1 before
the kernels of `prism_nemo.generation.cpu_kernels`): 67 % are products with weights, at 96 of the 95 to 110 GFLOP/s
that the core does in any product; 15 % attention, bound by the 12 to 15 GB/s at which it reads keys and values; 3 %
the choice of tokens, 3 % prompts but for their products, 3 % norms and gates; the rest is moving rows and Python. The
products alone allow 5,300 tokens/s; the peer writes 1,380 to 1,480 in its best setting, 256 rows, so 3 times its rate
leaves 1.3 to 1.8 s for all else, and 2.7 is reached. In use already: attention, norms, gates and choice as kernels of
our own, and of prompts the last layer for their last token alone. Against the peer's batch of 32 (`--peer-batches
32`) the ratio is 4.1. In bf16, and where tokens are sampled (12 ms per 256 rows in torch, 1.2 here), 3 is reached
against its best setting too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from train_throughput import DENSE, HYBRID, hf_values

from prism_nemo.config import ParallelConfig
from prism_nemo.models.family import architecture_from_hf
from prism_nemo.runtime import DTYPES, Runtime, start, stop

CASES: dict[str, dict[str, Any]] = {"dense": {**DENSE, "num_hidden_layers": 6}, "hybrid": HYBRID}
TARGET = 3.0
PROMPT, SHORTEST, LONGEST = 32, 8, 128
# The peer's batch sizes and caches, of which the fastest is compared with. It has no static cache for hybrids.
BATCHES = (32, 64, 128, 256)
CACHES: dict[str, tuple[str | None, ...]] = {"dense": (None, "static"), "hybrid": (None,)}

Responses = list[list[int]]
Sampler = Callable[[list[list[int]], list[int]], Responses]


def workload(count: int, samples: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, `samples` times each, and how long the response to each is."""
    generator = torch.Generator().manual_seed(0)
    different = torch.randint(1, DENSE["vocab_size"], (-(-count // samples), PROMPT), generator=generator).tolist()
    prompts = [prompt for prompt in different for _ in range(samples)][:count]
    return prompts, torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()


def ours(
    shape: dict[str, Any], runtime: Runtime, slots: int, temperature: float = 0.0
) -> tuple[Sampler, torch.nn.Module]:
    """This project's engine, and the model that it samples from."""
    from prism_nemo.generation.engine import Engine
    from prism_nemo.generation.requests import Request, SamplingParams
    from prism_nemo.models.build import build_model

    torch.manual_seed(0)
    # Wider weights than for training: responses then vary, as those of a trained model do.
    model = build_model(architecture_from_hf(hf_values(shape), "benchmark"), runtime, init_method_std=0.06)
    engine = Engine(model.eval(), slots)

    def sample(prompts: list[list[int]], lengths: list[int]) -> Responses:
        requests = [
            Request(prompt, SamplingParams(length, temperature, seed=number))
            for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        return [response.tokens for response in engine.generate(requests)]

    return sample, model


class _Ends:
    """The stopping criterion of a batch whose rows end after given numbers of tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.ends = PROMPT + torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def peer(
    model: torch.nn.Module, shape: dict[str, Any], dtype: torch.dtype, temperature: float = 0.0
) -> Callable[[int, str | None], Sampler]:
    """Transformers' model with our weights, for a batch size and a cache."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.generation import StoppingCriteriaList

    from prism_nemo.checkpoint.convert import hf_tensors

    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation="sdpa")
    weights = {
        name.replace("backbone.", "model."): tensor.float()
        for name, tensor in hf_tensors(model, model.architecture)  # type: ignore[arg-type]
    }
    theirs.load_state_dict(weights, strict=True)
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):  # a floor that transformers alone gives Nemotron-H: another function
            module.time_step_limit = (0.0, math.inf)
    theirs.to(dtype).eval()

    def setting(batch: int, cache: str | None) -> Sampler:
        options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
        # Temperature 1 without top-k and nucleus, which is what ours does and the study's rollouts are.
        options |= {"do_sample": True, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}

        @torch.inference_mode()
        def sample(prompts: list[list[int]], lengths: list[int]) -> Responses:
            found: Responses = []
            for first in range(0, len(prompts), batch):
                rows, ends = torch.tensor(prompts[first : first + batch]), lengths[first : first + batch]
                written = theirs.generate(
                    rows, attention_mask=torch.ones_like(rows), max_new_tokens=max(ends),
                    stopping_criteria=StoppingCriteriaList([_Ends(ends)]), pad_token_id=0, eos_token_id=None, **options,
                )  # fmt: skip
                found += [row[PROMPT : PROMPT + end].tolist() for row, end in zip(written, ends, strict=True)]
            return found

        return sample

    return setting


def timed(sampler: Sampler, prompts: list[list[int]], lengths: list[int]) -> tuple[float, Responses]:
    """Tokens per second of the processor's time, and the responses."""
    began = time.process_time()
    responses = sampler(prompts, lengths)
    return sum(map(len, responses)) / (time.process_time() - began), responses


def measure(
    case: str,
    kind: str,
    rounds: int,
    requests: int,
    samples: int,
    slots: int,
    temperature: float,
    batches: tuple[int, ...] = BATCHES,
) -> dict[str, Any]:
    """Find the peer's best setting among these batch sizes and all caches, then alternate."""
    shape, dtype = CASES[case], DTYPES[kind]
    runtime = dataclasses.replace(start(ParallelConfig(), seed=0), dtype=dtype)
    mine, model = ours(shape, runtime, slots, temperature)
    setting = peer(model, shape, dtype, temperature)
    prompts, lengths = workload(requests, samples)
    few = max(BATCHES)
    settings = {(batch, cache): setting(batch, cache) for batch in batches for cache in CACHES[case]}
    tried = {name: timed(sampler, prompts[:few], lengths[:few])[0] for name, sampler in settings.items()}
    best = max(tried, key=lambda name: tried[name])
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    written: dict[str, Responses] = {}
    contestants = {"ours": mine, "peer": settings[best]}
    timed(mine, prompts[:few], lengths[:few])  # warm up, as the peer did
    for i in range(rounds):
        for name in list(contestants) if i % 2 else reversed(list(contestants)):
            rate, written[name] = timed(contestants[name], prompts, lengths)
            rates[name].append(rate)
    stop()
    ratios = [a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)]
    same = sum(a == b for a, b in zip(written["ours"], written["peer"], strict=True))
    restricted = "" if batches == BATCHES else f" (batch {', '.join(map(str, batches))})"
    return {
        "name": f"rollout {case} {kind}: ours / transformers generate{restricted}",
        "ours": round(statistics.median(rates["ours"]), 1),
        "peer": round(statistics.median(rates["peer"]), 1),
        "unit": "tokens/s",
        "ratio": round(statistics.median(ratios), 3),
        "target": TARGET,
        "pass": statistics.median(ratios) >= TARGET,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "peer_settings": {f"batch {b}, cache {c or 'dynamic'}": round(rate, 1) for (b, c), rate in tried.items()},
        "slots": slots,
        "samples_per_prompt": samples,
        "temperature": temperature,
        "same_responses": f"{same} of {requests}",
        "distinct_tokens": len({token for response in written["ours"] for token in response}),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--temperature", type=float, choices=(0.0, 1.0), default=0.0)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--peer-batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in arguments.cases:
        for kind in arguments.dtypes:
            options = arguments.rounds, arguments.requests, arguments.samples, arguments.slots, arguments.temperature
            result = measure(case, kind, *options, tuple(arguments.peer_batches))
            if arguments.json:
                print(json.dumps(result), flush=True)
            else:
                print(
                    f"{result['name']}: {result['ours']} / {result['peer']} tok/s, {result['ratio']} "
                    f"(target {TARGET}; same responses: {result['same_responses']})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
