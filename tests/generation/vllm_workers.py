"""What the tests of prism_nemo.generation.vllm run in processes of their own, with the stand-in for vLLM."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_in"))

import vllm
from generation_workers import load_model

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import PrismError
from prism_nemo.generation.engine import Engine
from prism_nemo.generation.requests import Request, Response, SamplingParams
from prism_nemo.generation.vllm import VLLMEngine
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.runtime import start, stop

PROMPTS = [[3, 17, 101, 4, 9], [3, 17, 101, 4, 9], [88, 2, 61]]


def greedy(new: int = 8) -> list[Request]:
    """Greedy requests, two of which share a prompt."""
    return [Request(prompt, SamplingParams(new, 0.0, stop_ids=(5, 6))) for prompt in PROMPTS]


def make(model: LanguageModel, folder: str) -> VLLMEngine:
    """An engine before its first refit."""
    return VLLMEngine(model, Path(folder), torch.float32, 64, 0.25)


def _plain(responses: list[Response]) -> list[tuple[list[int], list[float], bool]]:
    return [(r.tokens, r.logprobs, r.finished) for r in responses]


@torch.no_grad()
def change(model: LanguageModel, names: str = "") -> None:
    """Move every weight, or those with `names` in their name, as an update would, by an amount that shows."""
    for name, parameter in model.named_parameters():
        if names in name:
            parameter.mul_(1.05)


def _everyone(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def native_and_vllm(hf_dirs: list[str], parallel: ParallelConfig, folder: str) -> list[Any]:
    """By rank and model: greedy responses of both engines, before and after the weights changed."""
    runtime = start(parallel, seed=0)
    found = []
    for hf_dir in hf_dirs:
        model = load_model(hf_dir, runtime)
        engine, native = make(model, folder), Engine(model)
        pairs = []
        for _ in range(2):
            engine.refit(model)
            pairs.append((_plain(native.generate(greedy())), _plain(engine.generate(greedy()))))
            change(model)
        found.append(pairs)
    everyone = _everyone(found)
    stop()
    return everyone


def one_process(hf_dir: str, hybrid_dir: str, folder: str) -> dict[str, Any]:
    """What an engine was built with and what it passes on; state of the random generators before and after."""
    runtime = start(ParallelConfig(), seed=0)
    model = load_model(hf_dir, runtime)

    def drawn() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    before = drawn()
    engine = make(model, folder)
    found: dict[str, Any] = {"random state kept": drawn() == before, "options": engine._llm.options}
    found["config"] = json.loads((Path(folder) / "config.json").read_text())
    found["before refit"] = _message(lambda: engine.generate(greedy()))
    engine.refit(model)
    sampled = [
        Request(PROMPTS[0], SamplingParams(20, 1.0, stop_ids=(5, 6, 7), seed=seed)) for seed in (11, 12, 11, 2**127 + 3)
    ]
    found["sampled"] = _plain(engine.generate(sampled))
    found["asked"] = engine._llm.asked
    hot = [Request(PROMPTS[2], SamplingParams(6, 0.5, top_k=9, top_p=0.9, seed=4))]
    written = engine.generate(hot)[0]
    found["asked hot"] = engine._llm.asked
    # The same tokens by the native engine's model, at temperature 1.
    logits = torch.log_softmax(engine._llm.model.inner(torch.tensor([written.prompt + written.tokens])).logits[0], -1)
    place = len(written.prompt) - 1
    found["hot"] = (written.logprobs, [logits[place + i, t].item() for i, t in enumerate(written.tokens)])
    found["nothing"] = engine.generate([])
    for name, request in {
        "stop texts": Request([1], SamplingParams(4, stop_texts=("x",))),
        "too long": Request([1] * 60, SamplingParams(5)),
        "no prompt": Request([], SamplingParams(5)),
        "vocabulary": Request([149], SamplingParams(5)),
    }.items():
        found[name] = _message(lambda request=request: engine.generate([request]))
    found["hybrid options"] = make(load_model(hybrid_dir, runtime), folder)._llm.options
    stop()
    return found


def _message(function: Any) -> str:
    try:
        function()
    except PrismError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def faulty(hf_dir: str, folder: str) -> dict[str, str]:
    """By fault of the stand-in, what a refit, an update, a second refit and a generation lead to."""
    runtime = start(ParallelConfig(), seed=0)
    found = {}
    for fault in (
        "none",
        "stale",
        "one stale layer",
        "skips a tensor",
        "stops early",
        "keeps its cache",
        "out of order",
        "no log-probabilities",
        "not finite",
    ):
        vllm.faults.clear()
        vllm.faults.add(fault)
        model = load_model(hf_dir, runtime)

        def use(model: LanguageModel = model) -> None:
            engine = make(model, folder)
            engine.refit(model)
            engine.refit(model)  # nothing changed, and nothing has to
            change(model)
            engine.refit(model)
            engine.generate(greedy(3))

        found[fault] = _message(use)
    stop()
    return found


def ranks_part(hf_dir: str, parallel: ParallelConfig, folder: str) -> list[str]:
    """What each rank says when they sample different tokens."""
    runtime = start(parallel, seed=0)
    vllm.faults.add("ranks part")
    model = load_model(hf_dir, runtime)
    engine = make(model, folder)
    engine.refit(model)
    found = _everyone(_message(lambda: engine.generate([Request(PROMPTS[0], SamplingParams(9, 1.0, seed=3))])))
    stop()
    return found
