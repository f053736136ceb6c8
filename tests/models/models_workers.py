"""What the tests of prism_nemo.models run in processes of their own; module-level, so that they can be pickled."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.config import ParallelConfig
from prism_nemo.runtime import start, stop


def split_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, tp: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss, and gradient of (weight * loss).sum() on this rank's share of the vocabulary, from every rank."""
    start(ParallelConfig(tp), seed=0)
    from prism_nemo.models.layers.cross_entropy import VocabParallelCrossEntropy

    share = logits.chunk(tp, dim=-1)[dist.get_rank()].clone().requires_grad_()
    loss = VocabParallelCrossEntropy.apply(share * 1.0, target)
    (gradient,) = torch.autograd.grad((loss * weight).sum(), share)
    results: list[Any] = [None] * tp
    dist.all_gather_object(results, (loss.detach(), gradient))
    stop()
    return results
