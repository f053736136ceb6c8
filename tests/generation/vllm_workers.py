"""What the tests of prism_nemo.generation.vllm run in processes of their own, with the stand-in for vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_in"))

import vllm
import vllm_calls
from generation_workers import load_model
from vllm_calls import PROMPTS, change, drawn, everyone, greedy, make, message, plain

from prism_nemo.config import ParallelConfig
from prism_nemo.generation.requests import Request, SamplingParams
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.runtime import start, stop


def native_and_vllm(hf_dirs: list[str], parallel: ParallelConfig, folder: str) -> Any:
    """See `vllm_calls.native_and_vllm`."""
    return vllm_calls.native_and_vllm(hf_dirs, parallel, folder)


def one_process(hf_dir: str, hybrid_dir: str, folder: str) -> dict[str, Any]:
    """What an engine was built with and what it passes on; state of the random generators before and after."""
    runtime = start(ParallelConfig(), seed=0)
    model = load_model(hf_dir, runtime)

    before = drawn()
    engine = make(model, folder)
    found: dict[str, Any] = {"random state kept": drawn() == before, "options": engine._llm.options}
    found["config"] = json.loads((Path(folder) / "config.json").read_text())
    found["before refit"] = message(lambda: engine.generate(greedy()))
    engine.refit(model)
    sampled = [
        Request(PROMPTS[0], SamplingParams(20, 1.0, stop_ids=(5, 6, 7), seed=seed)) for seed in (11, 12, 11, 2**127 + 3)
    ]
    found["sampled"] = plain(engine.generate(sampled))
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
        found[name] = message(lambda request=request: engine.generate([request]))
    found["hybrid options"] = make(load_model(hybrid_dir, runtime), folder)._llm.options
    stop()
    return found


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

        found[fault] = message(use)
    stop()
    return found


def ranks_part(hf_dir: str, parallel: ParallelConfig, folder: str) -> list[str]:
    """What each rank says when they sample different tokens."""
    runtime = start(parallel, seed=0)
    vllm.faults.add("ranks part")
    model = load_model(hf_dir, runtime)
    engine = make(model, folder)
    engine.refit(model)
    found = everyone(message(lambda: engine.generate([Request(PROMPTS[0], SamplingParams(9, 1.0, seed=3))])))
    stop()
    return found
