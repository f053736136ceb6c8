"""What the tests ask of the vLLM backend, whichever vLLM answers: the stand-in or the published one.

Neither is imported here: the modules that do (vllm_workers.py, vllm_published.py) first say where it is.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from generation_workers import load_model
from megatron.core import parallel_state

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import PrismError
from prism_nemo.generation.engine import Engine
from prism_nemo.generation.requests import Request, Response, SamplingParams
from prism_nemo.generation.vllm import VLLMEngine
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.runtime import start, stop

PROMPTS = [[3, 17, 101, 4, 9], [3, 17, 101, 4, 9], [88, 2, 61]]
Plain = list[tuple[list[int], list[float], bool]]


def greedy(new: int = 8) -> list[Request]:
    """Greedy requests, two of which share a prompt."""
    return [Request(prompt, SamplingParams(new, 0.0, stop_ids=(5, 6))) for prompt in PROMPTS]


def make(model: LanguageModel, folder: str, max_length: int = 64) -> VLLMEngine:
    """An engine before its first refit."""
    return VLLMEngine(model, Path(folder), torch.float32, max_length, 0.25)


def plain(responses: list[Response]) -> Plain:
    """Tokens, log-probabilities, and whether a stop token ended it."""
    return [(r.tokens, r.logprobs, r.finished) for r in responses]


@torch.no_grad()
def change(model: LanguageModel, names: str = "") -> None:
    """Move every weight, or those with `names` in their name, as an update would, by an amount that shows."""
    for name, parameter in model.named_parameters():
        if names in name:
            parameter.mul_(1.05)


def drawn() -> list[Any]:
    """Where this process's random generators stand."""
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def everyone(value: Any) -> list[Any]:
    """Each rank's value, on all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def message(function: Any) -> str:
    """What it raises, in words."""
    try:
        function()
    except PrismError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def native_and_vllm(hf_dirs: list[str], parallel: ParallelConfig, folder: str) -> list[list[list[tuple[Plain, Plain]]]]:
    """By rank and model: greedy responses of both engines, before and after the weights changed.

    With data parallelism each replica has other prompts, and another number of them.
    """
    runtime = start(parallel, seed=0)
    requests = greedy()[parallel_state.get_data_parallel_rank() :]
    found = []
    for hf_dir in hf_dirs:
        model = load_model(hf_dir, runtime)
        engine, native = make(model, folder), Engine(model)
        pairs = []
        for _ in range(2):
            engine.refit(model)
            pairs.append((plain(native.generate(requests)), plain(engine.generate(requests))))
            change(model)
        found.append(pairs)
    by_rank = everyone(found)
    stop()
    return by_rank


def same_greedy(pairs: list[tuple[Plain, Plain]]) -> None:
    """Holds what a rank got of `native_and_vllm` for one model to the same tokens and log-probabilities.

    Two implementations in fp32: log-probabilities differ by rounding of some 1e-5; other weights by 1e-1.
    """
    for native, ours in pairs:
        assert [(t, f) for t, _, f in ours] == [(t, f) for t, _, f in native]
        for (_, a, _), (_, b, _) in zip(native, ours, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    first, second = ([x for _, logprobs, _ in ours for x in logprobs] for _, ours in pairs)
    assert first != pytest.approx(second, abs=1e-2), "the change of the weights must show"
