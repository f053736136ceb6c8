"""The same updates under many settings in one layout; started by `prism_nemo.runtime.launch.launch`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from training_workers import _trainer

from prism_nemo.config import OptimizerConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from prism_nemo.models.recompute import recompute_fields
from prism_nemo.runtime import DTYPES, start, stop

OPTIMIZER = OptimizerConfig(lr=2e-3, adam_eps=1e-4, clip_grad=0.5)


@dataclass(frozen=True)
class Setting:
    """What is combined with a layout."""

    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    overlap: bool = False


@dataclass(frozen=True)
class Found:
    """What the updates came to: losses, gradient norms, and the most bytes that a forward pass kept on rank 0."""

    loss: list[float]
    grad_norm: list[float]
    kept: int


def train_each(
    runs: dict[str, tuple[str, dict[str, Setting]]],
    steps: list[dict[str, torch.Tensor]],
    parallel: ParallelConfig,
    micro_batch_size: int,
) -> dict[tuple[str, str], Found]:
    """Updates from the same weights for each case and setting; by case and name of the setting."""
    from megatron.core import parallel_state

    from prism_nemo.training.midtrain import forward_step

    runtime = start(parallel, seed=1)  # once: several processes cannot make their groups a second time
    rank, size = parallel_state.get_data_parallel_rank(), parallel.data_parallel_size
    found: dict[tuple[str, str], Found] = {}
    for case, (folder, settings) in runs.items():
        for name, setting in settings.items():
            # A bucket for each parameter: none is gathered because it lies beside another.
            overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 1}
            here = replace(
                runtime,
                precision=setting.precision,
                dtype=DTYPES[setting.precision.dtype or "fp32"],
                parallel=replace(parallel, **overlap) if setting.overlap else parallel,
            )
            trainer = _trainer(folder, parallel, OPTIMIZER, True, here, **recompute_fields(setting.recompute))
            result = Found([], [], 0)
            for rows in steps:
                share = len(rows["tokens"]) // size
                firsts = range(rank * share, (rank + 1) * share, micro_batch_size)
                mine = [{k: v[i : i + micro_batch_size] for k, v in rows.items()} for i in firsts]
                trainer.set_learning_rate(OPTIMIZER.lr)
                kept = _Kept(trainer)
                with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
                    step = trainer.step(forward_step, iter(mine), len(mine), micro_batch_size, rows["tokens"].shape[1])
                result.loss.append(step.sums["loss"] / step.sums["tokens"])
                result.grad_norm.append(step.grad_norm)
                result = replace(result, kept=kept.bytes)
            found[case, name] = result
    stop()
    return found


class _Kept:
    """Adds up what forward passes of a step keep, each time it is kept; parameters are not counted."""

    def __init__(self, trainer: Any) -> None:
        self.bytes = 0
        self._own = {p.untyped_storage().data_ptr() for p in trainer.raw.parameters()}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # Recomputation keeps again, inside the backward pass; what matters is what lives from forward to backward.
        if torch._C._current_graph_task_id() == -1 and x.untyped_storage().data_ptr() not in self._own:
            self.bytes += x.untyped_storage().nbytes()
        return x
