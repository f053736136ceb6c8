"""What the tests run in processes of their own; functions here are started by `prism_nemo.runtime.launch.launch`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prism_nemo.checkpoint.convert import load_hf_weights
from prism_nemo.checkpoint.hf import HFReader
from prism_nemo.config import MidtrainConfig, OptimizerConfig, ParallelConfig
from prism_nemo.models.family import read_hf_config
from prism_nemo.runtime import Runtime, start, stop


def _trainer(
    hf_dir: str,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    distributed: bool,
    runtime: Runtime | None = None,
    **overrides: Any,
) -> Any:
    from prism_nemo.models.parts import ModelParts
    from prism_nemo.training.trainer import Trainer

    runtime = runtime or start(parallel, seed=1)
    architecture = read_hf_config(Path(hf_dir))
    trainer = Trainer(architecture, runtime, optimizer, 32, distributed, **overrides)
    for part in trainer.raw if isinstance(trainer.raw, ModelParts) else [trainer.raw]:
        load_hf_weights(part, architecture, HFReader(Path(hf_dir)), parallel.tensor_model_parallel_size)
    trainer.optimizer.reload_model_params()
    return trainer


def train_on_rows(
    hf_dir: str,
    parallel: ParallelConfig,
    steps: list[dict[str, torch.Tensor]],
    micro_batch_size: int,
    optimizer: OptimizerConfig,
    overrides: dict[str, Any] | None = None,
) -> dict[str, list[float]]:
    """Updates on given rows, [global batch, s] per step, cut over data-parallel ranks and micro-batches in order.

    `overrides` are fields of Megatron's TransformerConfig.
    """
    from megatron.core import parallel_state

    from prism_nemo.training.midtrain import forward_step

    trainer = _trainer(hf_dir, parallel, optimizer, True, **(overrides or {}))
    rank = parallel_state.get_data_parallel_rank()
    found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "tokens": []}
    for rows in steps:
        share = len(rows["tokens"]) // parallel.data_parallel_size

        def batches(rows: dict[str, torch.Tensor] = rows, share: int = share) -> Iterator[dict[str, torch.Tensor]]:
            for first in range(rank * share, (rank + 1) * share, micro_batch_size):
                yield {name: tensor[first : first + micro_batch_size] for name, tensor in rows.items()}

        trainer.set_learning_rate(optimizer.lr)
        result = trainer.step(
            forward_step, batches(), share // micro_batch_size, micro_batch_size, rows["tokens"].shape[1]
        )
        found["loss"].append(result.sums["loss"] / result.sums["tokens"])
        found["tokens"].append(result.sums["tokens"])
        found["grad_norm"].append(result.grad_norm)
    stop()
    return found


def decay_alone(hf_dir: str, distributed: bool, lr: float) -> dict[str, tuple[int, float, float]]:
    """One update whose gradients are all exactly zero: what changes is weight decay.

    Returns:
        Per parameter its number of dimensions and the smallest and largest ratio of new to old values.
    """
    trainer = _trainer(hf_dir, ParallelConfig(), OptimizerConfig(lr=1.0, weight_decay=0.1), distributed)
    before = {name: p.detach().clone() for name, p in trainer.raw.named_parameters()}
    tokens = torch.arange(32)[None]

    def nothing(batches: Any, model: Any) -> Any:
        losses = model(tokens, torch.arange(32)[None], None, labels=tokens)
        return losses, lambda output: (output.sum() * 0.0, torch.tensor(32, dtype=torch.int), {"loss": output.sum()})

    trainer.set_learning_rate(lr)
    result = trainer.step(nothing, iter([]), 1, 1, 32)
    assert result.grad_norm == 0.0
    changes = {}
    for name, p in trainer.raw.named_parameters():
        ratio = p.detach() / before[name]
        changes[name] = (p.dim(), ratio.min().item(), ratio.max().item())
    stop()
    return changes


def midtrain_interrupted(config: MidtrainConfig, at_step: int, how: str) -> Any:
    """Mid-training in which something happens at a step.

    Args:
        config: As for `midtrain`.
        at_step: 1 is the first update of this process.
        how: ``stop``: asked to stop after the step; ``kill``: the process is killed while it saves after the step, with
            all files written and the checkpoint not yet published.
    """
    from prism_nemo.checkpoint import native
    from prism_nemo.training import midtrain as module
    from prism_nemo.training.stopping import StopRequest

    asked, calls = StopRequest.agreed, 0
    if how == "stop":

        def agreed(self: StopRequest) -> bool:
            nonlocal calls
            calls += 1
            if calls == at_step:
                os.kill(os.getpid(), signal.SIGUSR1)  # on every rank; Slurm sends it to all
            return asked(self)

        StopRequest.agreed = agreed  # type: ignore[method-assign]
    else:
        publish = native.publish

        def killed(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
            if manifest["step"] == at_step:
                os.kill(os.getpid(), signal.SIGKILL)
            publish(temporary, final, manifest)

        native.publish = killed
    return module.midtrain(config)


def train_from(
    hf_dir: str,
    checkpoint: str | None,
    out: str | None,
    parallel: ParallelConfig,
    steps: list[dict[str, torch.Tensor]],
    optimizer: OptimizerConfig,
) -> list[tuple[float, float]]:
    """Updates from the folder, or from a checkpoint with its optimizer; saves at the end if `out` is given.

    Returns:
        (loss, gradient norm) of each step.
    """
    from prism_nemo.checkpoint import native
    from prism_nemo.training.midtrain import forward_step

    trainer = _trainer(hf_dir, parallel, optimizer, True)
    if checkpoint is not None:
        with torch.no_grad():  # whatever is not loaded must be seen
            for parameter in trainer.raw.parameters():
                parameter.fill_(0.123)
        native.load(Path(checkpoint), trainer.raw, trainer.optimizer)
    found = []
    for rows in steps:
        trainer.set_learning_rate(optimizer.lr)
        size = len(rows["tokens"]) // (2 if parallel.virtual_pipeline_model_parallel_size > 1 else 1)
        parts = [{k: v[i : i + size] for k, v in rows.items()} for i in range(0, len(rows["tokens"]), size)]
        result = trainer.step(forward_step, iter(parts), len(parts), size, rows["tokens"].shape[1])
        found.append((result.sums["loss"] / result.sums["tokens"], result.grad_norm))
    if out is not None:
        native.save(Path(out), trainer.raw, trainer.architecture, trainer.optimizer, native.TrainState(step=len(steps)))
    stop()
    return found
