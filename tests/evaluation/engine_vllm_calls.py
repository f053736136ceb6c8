"""What the tests ask of the vLLM engine, whichever vLLM answers: the stand-in or the published one.

Neither is imported here: the modules that do (engine_vllm_workers.py, engine_vllm_published.py) first say where it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))

from generation_workers import load_model

from prism_nemo.config import ParallelConfig
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.evaluation.engines.contract import Continuation, Likelihood
from prism_nemo.evaluation.engines.megatron import MegatronModel
from prism_nemo.evaluation.engines.vllm import VLLMModel
from prism_nemo.generation.requests import Request, Response
from prism_nemo.runtime import start, stop

Answers = tuple[list[Response], list[Likelihood]]


def answers(
    hf_dir: str,
    tokenizer: str,
    folder: str,
    requests: list[Request],
    continuations: list[Continuation],
    layout: ParallelConfig,
) -> tuple[Answers, Answers, VLLMModel]:
    """What vLLM and our engine answer, and the former; the process group is left open."""
    model = load_model(hf_dir, start(layout, seed=0))
    known = load_tokenizer(tokenizer)
    theirs = VLLMModel(model, known, Path(folder), torch.float32)
    ours = MegatronModel(model, known)
    return (
        (theirs.generate(requests), theirs.score(continuations)),
        (ours.generate(requests), ours.score(continuations)),
        theirs,
    )


def both(*args: Any) -> tuple[Answers, Answers, int]:
    """The same answers, and the longest that vLLM reads."""
    theirs, ours, engine = answers(*args)
    longest = engine.max_length
    stop()
    return theirs, ours, longest
