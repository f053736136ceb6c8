"""A small evaluation every so many steps of a stage, and its curves in the stage's metrics.

On the ranks (``mode: ranks``) training waits while the stage's own model is asked, and goes on with the same numbers as
if nothing had been asked: random generators and the training mode are put back, and nothing else of the state is
touched. In a process (``mode: process``, see `process`) checkpoints are evaluated while training goes on.

Lines of ``metrics.jsonl`` get, under the step that was evaluated:

    eval/loss/SOURCE        nats per token of held-out running text
    eval/accuracy/TASK      share of right answers; eval/accuracy_low/TASK and _high/TASK are its 95 % interval
    eval/form/TASK          share of answers in the required form
    eval/length/TASK        mean length of an answer, in tokens

Questions come from the validation split, the same ones at every step and for every run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from prism_nemo.checkpoint.native import generators, restore_generators
from prism_nemo.config import RewardConfig, RolloutConfig
from prism_nemo.data.held_out import held_out_rows
from prism_nemo.data.samples import Batch
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.evaluation.in_training.suite import SEED, Suite, questions_of
from prism_nemo.evaluation.statistics.intervals import clustered_interval
from prism_nemo.generation.engine import Engine
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import positions
from prism_nemo.rl.rewards.judge import Judge
from prism_nemo.rl.rewards.task import Problem, task_named
from prism_nemo.rl.rollout import roll_out
from prism_nemo.run import RunDirectory, read_metrics
from prism_nemo.runtime import gather
from prism_nemo.training.trainer import ForwardStep, Trainer

PREFIX = "eval/"
_BATCH = 64  # questions
_ROWS = 8  # of text

# [rows, seq_length] token ids and labels -> mean nats per token
LossOf = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass
class SmallEvaluation:
    """Asks a model; every rank of it calls `measure`.

    Attributes:
        suite: What is asked.
        loss_of: The model's loss on rows that every rank gets whole.
        engine: Samples answers; None without tasks.
    """

    suite: Suite
    loss_of: LossOf
    engine: Engine | None
    _rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _problems: dict[str, list[Problem]] = field(default_factory=dict)

    def measure(self) -> dict[str, float]:
        """The values of the module's table, the same on every rank."""
        suite = self.suite
        values: dict[str, float] = {}
        for source in suite.sources:
            if source not in self._rows:
                self._rows[source] = held_out_rows(suite.data or "", source, suite.seq_length, suite.rows)
            values[f"{PREFIX}loss/{source}"] = self.loss_of(*self._rows[source])
        if suite.tasks:
            values |= self._accuracies()
        return values

    def _accuracies(self) -> dict[str, float]:
        suite = self.suite
        if self.engine is None or suite.tokenizer is None:
            raise RuntimeError("tasks need an engine and a tokenizer")
        self._problems = self._problems or questions_of(suite)
        tokenizer = load_tokenizer(suite.tokenizer)
        tasks = {name: task_named(name) for name in suite.tasks}
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        rollout = RolloutConfig(
            group_size=1, max_new_tokens=suite.max_new_tokens, temperature=suite.temperature, prompts_per_step=1
        )
        values: dict[str, float] = {}
        known = {task.name: task for task in tasks.values()}
        with Judge(RewardConfig(gate=suite.gate), known, suite.max_new_tokens, tokenizer.end) as judge:
            for name, problems in self._problems.items():
                mine = list(enumerate(problems))[rank::size]
                found = []
                for first in range(0, len(mine), _BATCH):
                    for r in roll_out(self.engine, mine[first : first + _BATCH], judge, tokenizer, rollout, SEED):
                        found.append((float(r.score.reward), r.score.well_formed, len(r.response.tokens)))
                everyone = [item for part in gather(found) for item in part]
                values |= _accuracy(name, everyone)
        return values


def _accuracy(name: str, found: Sequence[tuple[float, bool, int]]) -> dict[str, float]:
    interval = clustered_interval([[reward] for reward, _, _ in found])
    return {
        f"{PREFIX}accuracy/{name}": interval.estimate,
        f"{PREFIX}accuracy_low/{name}": interval.low,
        f"{PREFIX}accuracy_high/{name}": interval.high,
        f"{PREFIX}form/{name}": sum(formed for _, formed, _ in found) / len(found),
        f"{PREFIX}length/{name}": sum(length for _, _, length in found) / len(found),
    }


def on_ranks(suite: Suite, trainer: Trainer, forward_step: ForwardStep, micro_batch_size: int) -> SmallEvaluation:
    """The evaluation of a model in training, by its own ranks.

    Args:
        suite: What is asked.
        trainer: Whose model.
        forward_step: For text, as in mid-training.
        micro_batch_size: Rows of a pass.
    """

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        size = parallel_state.get_data_parallel_world_size()
        passes = -(-len(tokens) // (micro_batch_size * size))
        first = passes * micro_batch_size * parallel_state.get_data_parallel_rank()
        batches = _text_batches(tokens, labels, first, passes, micro_batch_size, trainer.runtime.device)
        sums = trainer.evaluate(forward_step, batches, passes, micro_batch_size, tokens.shape[1])
        for part in trainer.parts:
            part.eval()  # `evaluate` leaves them in training mode, and answers may have to be sampled yet
        return sums["loss"] / sums["tokens"]

    return SmallEvaluation(suite, loss_of, Engine(trainer.raw) if suite.tasks else None)


def by_itself(suite: Suite, model: LanguageModel) -> SmallEvaluation:
    """The evaluation of a whole model in one process."""

    @torch.no_grad()
    def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        device, total = next(model.parameters()).device, 0.0
        for first in range(0, len(tokens), _ROWS):
            given, scored = (x[first : first + _ROWS].to(device) for x in (tokens, labels))
            total += float(model(given, positions(given), None, labels=scored).double().sum())
        return total / tokens.numel()

    return SmallEvaluation(suite, loss_of, Engine(model) if suite.tasks else None)


def _text_batches(
    tokens: torch.Tensor, labels: torch.Tensor, first: int, passes: int, size: int, device: torch.device
) -> Iterator[Batch]:
    """Micro-batches from row `first` on. Beyond the last row come rows that do not count: so the same rows are measured
    in any layout."""
    for start in range(first, first + passes * size, size):
        places = torch.arange(start, start + size)
        rows = places % len(tokens)
        batch = {
            "tokens": tokens[rows],
            "labels": labels[rows],
            "position_ids": positions(tokens[rows]).contiguous(),
            "loss_mask": (places < len(tokens)).float()[:, None].expand(-1, tokens.shape[1]).contiguous(),
        }
        yield {name: value.to(device) for name, value in batch.items()}


@contextmanager
def undisturbed(parts: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Puts back what an evaluation could move: every random generator, and the training mode of every module."""
    modes = [(module, module.training) for part in parts for module in part.modules()]
    states, python, arrays = generators(), random.getstate(), np.random.get_state()
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        restore_generators(states)
        random.setstate(python)
        np.random.set_state(arrays)


def told(step: int, values: dict[str, Any]) -> str:
    """A line for people."""
    losses = [f"{name.split('/', 2)[2]} {v:.3f}" for name, v in values.items() if name.startswith(f"{PREFIX}loss/")]
    accuracies = [
        f"{name.split('/', 2)[2]} {100 * v:.0f} %"
        for name, v in values.items()
        if name.startswith(f"{PREFIX}accuracy/")
    ]
    parts = [f"loss {', '.join(losses)}"] * bool(losses) + [f"right {', '.join(accuracies)}"] * bool(accuracies)
    return f"step {step}: evaluation: {'; '.join(parts)}"


def steps_evaluated(run: RunDirectory) -> set[int]:
    """Steps whose evaluation is in a run's metrics."""
    lines = read_metrics(run.metrics_path)
    return {line["step"] for line in lines if any(name.startswith(PREFIX) for name in line)}
