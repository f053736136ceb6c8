"""Context parallelism: ranks share the tokens of a row, and swap tokens for heads where tokens must meet.

Rank r of n holds the r-th of n equal stretches of every row, in order. Norms, projections, MLPs and the loss work on
single tokens and need nothing else. Attention and Mamba's convolution and recurrence work on single heads: in front of
them an all-to-all gives each rank all tokens of its share of the heads, and another one behind them brings the tokens
back ("Ulysses", arXiv 2309.14509; Megatron's ssm/mamba_context_parallel.py does the same to its mixers). So the layers
see whole rows, whatever the documents in them, their windows and their positions: nothing about them depends on the
cut, every rank has the same work, and no sum is taken in another order but for that of weights' gradients, which
Megatron adds up over data- and context-parallel ranks.

The price is that each rank must have a head of each kind: see `fits_context_parallel`. Transformer Engine's ring
attention has no such limit, but wants each document padded to a multiple of 2 n tokens and cut in two stretches per
rank; it is not used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.autograd.function import once_differentiable

from prism_nemo.errors import InputError

Batch = dict[str, torch.Tensor]


class _AllToAll(torch.autograd.Function):
    """x[i] of this rank becomes x[rank] of rank i; that is its own inverse and its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(grads[0], ctx.group), None


def _exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def to_heads(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """All tokens of this rank's share of the channels, from its share of the tokens of all channels.

    Args:
        tensors: [t / n, ..., c] each; they may differ in c, a multiple of n.
        group: Of n ranks.

    Returns:
        [t, ..., c / n] each: the rank-th part of the channels.
    """
    n = group.size()
    parts = [x.unflatten(-1, (n, -1)).movedim(-2, 0) for x in tensors]
    received = _AllToAll.apply(torch.cat(parts, dim=-1), group).flatten(0, 1)
    return list(received.split([part.shape[-1] for part in parts], dim=-1))


def to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Inverse of `to_heads`: [t, ..., c / n] -> [t / n, ..., c]."""
    received = _AllToAll.apply(x.unflatten(0, (group.size(), -1)), group)
    return received.movedim(0, -2).flatten(-2)


def repeats(groups: int, size: int) -> int:
    """Copies of each group of keys and values, or of B and C, so that `size` ranks have at least one each."""
    return 1 if groups % size == 0 else size // groups


def cut_batch(batch: Batch) -> Batch:
    """This rank's share of a micro-batch, or the batch itself without context parallelism.

    ``cu_seqlens`` stays whole, because attention sees whole rows. What counts rows and not tokens is counted once:
    ``text_tokens`` and ``flops`` are zero on all ranks but the first. ``row_of_token`` is added where rows come
    flattened to one: the row of ``sources`` that each token of the share belongs to.

    Raises:
        InputError: If the tokens of a row cannot be shared evenly.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    rank, length = parallel_state.get_context_parallel_rank(), batch["tokens"].shape[1]
    if length % size:
        raise InputError(f"rows of {length} tokens cannot be shared by context_parallel_size {size} ranks")
    share = slice(rank * length // size, (rank + 1) * length // size)
    cut = dict(batch)
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        cut[name] = batch[name][:, share].contiguous()
    if "sources" in batch and "cu_seqlens" in batch:
        rows = len(batch["sources"])
        cut["row_of_token"] = torch.arange(length, device=batch["tokens"].device)[share] // (length // rows)
    if rank > 0:
        for name in ("text_tokens", "flops"):
            if name in batch:
                cut[name] = torch.zeros_like(batch[name])
    return cut
