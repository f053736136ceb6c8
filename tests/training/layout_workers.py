"""Recomputation beside none, and faults on purpose; started by `prism_nemo.runtime.launch.launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from training_workers import _trainer

from prism_nemo.config import MidtrainConfig, OptimizerConfig, ParallelConfig, RecomputeConfig
from prism_nemo.models.recompute import recompute_fields
from prism_nemo.runtime import start, stop

Packed = dict[str, torch.Tensor]


def packed_row(vocab_size: int, lengths: list[int]) -> Packed:
    """One row of documents of these lengths."""
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(0, vocab_size, (2, 1, sum(lengths)), generator=generator)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.ones(1, sum(lengths)),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }


def recomputed(
    runs: dict[str, tuple[str, dict[str, RecomputeConfig]]], row: Packed, parallel: ParallelConfig
) -> dict[tuple[str, str], tuple[int, float, float]]:
    """Forward and backward of one packed row of each case with each of its settings.

    Returns:
        By case and setting: bytes that the forward pass keeps for the backward pass, each storage counted once and
        parameters not at all; the loss's difference from the first setting; and the largest difference of a gradient
        from the first setting's.
    """
    from prism_nemo.training.midtrain import forward_step

    runtime = start(parallel, seed=1)  # once: several processes cannot make their groups a second time
    found: dict[tuple[str, str], tuple[int, float, float]] = {}
    for case, (folder, settings) in runs.items():
        first: tuple[float, dict[str, torch.Tensor]] | None = None
        for name, recompute in settings.items():
            trainer = _trainer(folder, parallel, OptimizerConfig(), False, runtime, **recompute_fields(recompute))
            own = {parameter.untyped_storage().data_ptr() for parameter in trainer.raw.parameters()}
            kept: dict[int, int] = {}

            def pack(x: torch.Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> torch.Tensor:
                storage = x.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                output, loss_of = forward_step(iter([row]), trainer.model)
            size = sum(kept.values())
            loss, _, _ = loss_of(output)
            loss.backward()
            gradients = {n: p.main_grad.clone() for n, p in trainer.raw.named_parameters()}
            first = first or (loss.item(), gradients)
            worst = max((gradients[n] - g).abs().max().item() for n, g in first[1].items())
            found[case, name] = size, loss.item() - first[0], worst
    stop()
    return found


def overlapped_weights(hf_dir: str, parallel: ParallelConfig, steps: list[Packed], optimizer: OptimizerConfig) -> Any:
    """Train, and take the weights right after the last update, when they may not have been gathered yet.

    Returns:
        Rank 0's (losses, gradient norms, weights).
    """
    from megatron.core import parallel_state

    from prism_nemo.training.midtrain import forward_step

    trainer = _trainer(hf_dir, parallel, optimizer, True)
    rank, size = parallel_state.get_data_parallel_rank(), parallel.data_parallel_size
    losses, norms = [], []
    for number, rows in enumerate(steps):
        share, many = len(rows["tokens"]) // size, number % 2 + 1  # steps of different numbers of micro-batches
        starts = range(rank * share, (rank + 1) * share, many)
        mine = [{k: v[i : i + many] for k, v in rows.items()} for i in starts]
        result = trainer.step(forward_step, iter(mine), len(mine), many, rows["tokens"].shape[1])
        losses.append(result.sums["loss"] / result.sums["tokens"])
        norms.append(result.grad_norm)
    weights = {name: p.detach().clone() for name, p in trainer.raw.named_parameters()}
    buckets = sum(len(buffer.buckets) for part in trainer.parts for buffer in part.buffers)
    stop()
    return losses, norms, weights, buckets


def refused_by_build(hf_dir: str, parallel: ParallelConfig) -> str:
    """What `build_model`, which returns one part, says to a layout of several."""
    from prism_nemo.errors import InputError
    from prism_nemo.models.build import build_model
    from prism_nemo.models.family import read_hf_config

    runtime = start(parallel, seed=1)
    try:
        build_model(read_hf_config(Path(hf_dir)), runtime)
    except InputError as error:
        return str(error)
    finally:
        stop()
    return ""


def asked_of_the_trainer(config: MidtrainConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that mid-training gives to its trainer."""
    from prism_nemo.training import midtrain as module

    asked: dict[str, Any] = {}

    def trainer(*_: Any, **overrides: Any) -> Any:
        asked.update(overrides)
        raise RuntimeError("that is all")

    module.Trainer = trainer  # type: ignore[assignment,misc]
    try:
        module.midtrain(config)
    except RuntimeError:
        stop()
    return asked
