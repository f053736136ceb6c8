"""Swapping tokens for heads and back, in processes of their own."""

from __future__ import annotations

from typing import Any

import torch

from prism_nemo.config import ParallelConfig
from prism_nemo.models.layers.context_parallel import cut_batch, to_heads, to_tokens
from prism_nemo.runtime import start, stop


def swapped(size: int) -> list[Any]:
    """What every rank gets: of numbers that say where they were, and of the gradient of what it sends back."""
    from megatron.core import parallel_state

    start(ParallelConfig(context_parallel_size=size), seed=1)
    group, rank = parallel_state.get_context_parallel_group(), parallel_state.get_context_parallel_rank()
    tokens = torch.arange(12.0).view(12, 1, 1)
    whole = tokens * 100 + torch.arange(8.0)  # [t, 1, c]: 100 x token + channel
    mine = whole.chunk(size)[rank].clone().requires_grad_()
    wide, narrow = to_heads([mine, mine[..., :4]], group)
    right = wide.equal(whole.chunk(size, -1)[rank]) and narrow.equal(whole[..., :4].chunk(size, -1)[rank])
    # Weights that say where they are find their way back to the numbers they were multiplied with.
    (wide * wide.detach()).sum().backward()
    there = mine.grad is not None and mine.grad.equal(mine.detach())
    mine.grad = None
    back = to_tokens(wide.detach().requires_grad_(), group)
    moved = wide.detach().requires_grad_()
    (to_tokens(moved, group) * back.detach()).sum().backward()
    again = moved.grad is not None and moved.grad.equal(wide.detach())
    stop()
    return [right, there, back.equal(mine), again]


def shares(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """Every rank's share of a batch, on rank 0."""
    import torch.distributed as dist

    start(ParallelConfig(context_parallel_size=size), seed=1)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, cut_batch(batch))
    stop()
    return everyone
