"""How many responses can be written at a time without running out of memory."""

from __future__ import annotations

import torch
import torch.distributed as dist

from prism_nemo.errors import InputError
from prism_nemo.generation.decode import Decoder
from prism_nemo.generation.simd import LANES
from prism_nemo.runtime.memory import free_memory

# Of the free memory: the rest is for a layer's cache that is copied as it grows, logits and the passes over prompts.
_SHARE = 0.5


def row_bytes(decoder: Decoder, tokens: int) -> int:
    """Memory of this rank's caches for one response of `tokens` tokens, its prompt included."""

    def size(capacity: int) -> int:
        return sum(cache.nbytes() for cache in decoder.caches(1, capacity))

    # A state of fixed size, and so much for each block of tokens: small caches tell what large ones take.
    one, two, blocks = size(LANES), size(2 * LANES), -(-tokens // LANES)
    return one + (blocks - 1) * (two - one)


def affordable(decoder: Decoder, tokens: int, group: dist.ProcessGroup | None) -> int:
    """Responses of `tokens` tokens whose caches fit in half of the memory that is free now, on every rank of the group.

    Args:
        decoder: Of this rank's part of the model.
        tokens: Longest response with its prompt.
        group: Model-parallel ranks, which have to agree; None for one rank.

    Raises:
        InputError: If not even one fits.
    """
    device = decoder.like.device
    each, free = row_bytes(decoder, tokens), free_memory(device)
    count = torch.tensor([int(_SHARE * free) // each if each else tokens << 32], dtype=torch.int64, device=device)
    if group is not None:
        dist.all_reduce(count, dist.ReduceOp.MIN, group=group)
    if count.item() < 1:
        raise InputError(
            f"the caches of one response of {tokens} tokens take {each / 1e9:.1f} GB on a rank; {free / 1e9:.1f} GB "
            f"are free, and {_SHARE:.0%} of that may be taken. Lower max_new_tokens, or use more tensor- or "
            "pipeline-parallel ranks"
        )
    return int(count.item())
