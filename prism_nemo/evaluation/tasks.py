"""Accuracy on held-out verifiable questions, and loss on held-out text, of one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.config import ParallelConfig, RewardConfig, RolloutConfig
from prism_nemo.data.held_out import held_out_rows
from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer
from prism_nemo.evaluation.statistics.intervals import wilson_interval
from prism_nemo.generation.engine import Engine
from prism_nemo.models.build import build_model
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import positions
from prism_nemo.rl.rewards.judge import Judge
from prism_nemo.rl.rewards.task import Task, task_named
from prism_nemo.rl.rollout import Rollout, roll_out
from prism_nemo.runtime import gather, start, stop


@dataclass
class EvaluationConfig:
    """What to measure. Questions come from `split`; every checkpoint gets the same ones.

    Attributes:
        data: Folder of built data; needed for `retention`.
        retention: Name of a held-out source of general text in it, or None for no retention loss.
    """

    tokenizer: str
    tasks: list[str]
    split: str = "test"
    questions: int = 512
    max_new_tokens: int = 48
    data: str | None = None
    retention: str | None = None
    retention_rows: int = 256
    seq_length: int = 128
    batch_size: int = 128
    seed: int = 7
    samples_kept: int = 3
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def _accuracy(
    engine: Engine, judge: Judge, tokenizer: Tokenizer, config: EvaluationConfig, task: Task
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sampled (temperature 1, one sample a question) and greedy accuracy on one task."""
    problems = list(enumerate(task.distinct(config.questions, config.split, config.seed)))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = problems[rank::size]
    result: dict[str, Any] = {"n": len(problems)}
    samples: list[dict[str, Any]] = []
    for mode, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        rollout = RolloutConfig(
            group_size=1, prompts_per_step=1, max_new_tokens=config.max_new_tokens, temperature=temperature
        )
        found: list[Rollout] = []
        for first in range(0, len(mine), config.batch_size):
            found += roll_out(engine, mine[first : first + config.batch_size], judge, tokenizer, rollout, config.seed)
        found = [rollout for part in gather(found) for rollout in part]
        right = int(sum(r.score.reward for r in found))
        bounds = wilson_interval(right, len(found))
        interval = [bounds.low, bounds.high]
        if mode == "sampled":
            result["accuracy"], result["ci95"] = right / len(found), interval
            result["format_rate"] = sum(r.score.well_formed for r in found) / len(found)
            result["mean_response_tokens"] = sum(len(r.response.tokens) for r in found) / len(found)
            samples = [
                {
                    "task": task.name,
                    "prompt": r.problem.prompt,
                    "response": r.text,
                    "answer": r.problem.answer,
                    "reward": r.score.reward,
                }
                for r in found[: config.samples_kept]
            ]
        else:
            result["greedy_accuracy"], result["greedy_ci95"] = right / len(found), interval
    return result, samples


@torch.no_grad()
def _held_out_loss(model: LanguageModel, config: EvaluationConfig, source: str) -> float:
    """Mean cross entropy per token on evenly spaced rows of a held-out source."""
    tokens, labels = held_out_rows(config.data or "", source, config.seq_length, config.retention_rows)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    device = next(model.parameters()).device
    tokens, labels = tokens.to(device), labels.to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(rank * 16, len(tokens), size * 16):
        part = slice(first, first + 16)
        losses = model(tokens[part], positions(tokens[part]), None, labels=labels[part])
        sums += torch.tensor([losses.double().sum().item(), losses.numel()], device=device)
    group = parallel_state.get_data_parallel_group()
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    return float(sums[0] / sums[1])


def evaluate_checkpoint(config: EvaluationConfig, checkpoint: str) -> dict[str, Any]:
    """Measure one checkpoint; every rank calls this.

    Returns:
        ``tasks`` (accuracy, ci95, n, greedy_accuracy, ...), ``retention_loss`` where asked for, and ``samples``.
    """
    runtime = start(config.parallel, config.seed)
    model = build_model(read_architecture(Path(checkpoint)), runtime)
    load(Path(checkpoint), model)
    model.eval()
    tasks, samples = {}, []
    known = [task_named(name) for name in config.tasks]
    engine = Engine(model, slots=config.batch_size)
    tokenizer = load_tokenizer(config.tokenizer)
    with Judge(RewardConfig(), {task.name: task for task in known}, config.max_new_tokens, tokenizer.end) as judge:
        for task in known:
            tasks[task.name], kept = _accuracy(engine, judge, tokenizer, config, task)
            samples += kept
    result: dict[str, Any] = {"tasks": tasks, "samples": samples}
    if config.retention is not None:
        result["retention_loss"] = _held_out_loss(model, config, config.retention)
    stop()
    return result
