"""What the evaluation tests run in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.config import ParallelConfig
from prism_nemo.data.held_out import held_out_rows
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.evaluation.tasks import EvaluationConfig, evaluate_checkpoint
from prism_nemo.generation.engine import Engine
from prism_nemo.generation.requests import Request, Response
from prism_nemo.models.build import build_model
from prism_nemo.models.family import parameter_count, read_hf_config
from prism_nemo.models.forward import forward_logits
from prism_nemo.rl.rewards.task import CLOSE, task_named
from prism_nemo.runtime import start, stop


def direct_loss(checkpoint: str, data: str, source: str, rows: int, seq_length: int) -> float:
    """Mean cross entropy from plain logits."""
    runtime = start(ParallelConfig(), seed=0)
    model = build_model(read_architecture(Path(checkpoint)), runtime)
    load(Path(checkpoint), model)
    tokens, labels = held_out_rows(data, source, seq_length, rows)
    logits = forward_logits(model, tokens)
    stop()
    if logits is None:
        raise RuntimeError("no logits")
    return float(F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten()))


def evaluate_a_model_that_is_right_every_other_time(config: EvaluationConfig, checkpoint: str) -> dict[str, Any]:
    """The evaluation with a sampler that writes the right answer to every second question."""
    known = _known_answers(config)
    order = {prompt: i for i, prompt in enumerate(known)}

    def right(prompt: tuple[int, ...], _: float) -> bool:
        return order[prompt] % 2 == 0

    return _evaluate(config, checkpoint, known, right)


def evaluate_with_known_answers(
    config: EvaluationConfig, checkpoint: str, temperatures: tuple[float, ...] = (0.0, 1.0)
) -> dict[str, Any]:
    """The evaluation with a sampler that has the answers to the test questions, and only at some temperatures."""
    known = _known_answers(config)
    return _evaluate(config, checkpoint, known, lambda prompt, temperature: temperature in temperatures)


def _known_answers(config: EvaluationConfig) -> dict[tuple[int, ...], list[int]]:
    tokenizer = load_tokenizer(config.tokenizer)
    known = {}
    for name in config.tasks:
        for problem in task_named(name).distinct(config.questions, "test", config.seed):
            written = problem.document[len(problem.prompt) :]
            known[tuple(tokenizer.encode(problem.prompt))] = [*tokenizer.encode(written), tokenizer.eos_id]
    return known


def _evaluate(
    config: EvaluationConfig,
    checkpoint: str,
    known: dict[tuple[int, ...], list[int]],
    right: Callable[[tuple[int, ...], float], bool],
) -> dict[str, Any]:
    tokenizer = load_tokenizer(config.tokenizer)
    wrong = [*tokenizer.encode(f"{CLOSE}wrong"), tokenizer.eos_id]

    def generate(_: Engine, requests: list[Request]) -> list[Response]:
        responses = []
        for request in requests:
            prompt = tuple(request.prompt)
            if prompt not in known:
                ids = [tokenizer.eos_id]
            else:
                ids = known[prompt] if right(prompt, request.sampling.temperature) else wrong
            responses.append(Response(request.prompt, ids, [0.0] * len(ids), True))
        return responses

    Engine.generate = generate  # type: ignore[method-assign]
    return evaluate_checkpoint(config, checkpoint)


def parameters_of(hf_dirs: list[str]) -> list[tuple[int, int]]:
    """Per model, the count from the sizes and the sum over a model that was built."""
    runtime = start(ParallelConfig(), seed=0)
    found = []
    for hf_dir in hf_dirs:
        architecture = read_hf_config(Path(hf_dir))
        model = build_model(architecture, runtime)
        found.append((parameter_count(architecture), sum(p.numel() for p in model.parameters())))
    stop()
    return found
