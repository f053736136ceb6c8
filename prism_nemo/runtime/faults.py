"""Faults of Megatron-Core 0.16.1 that have nothing to do with the machine, mended on every machine.

Each names the upstream file and line and what goes wrong without the mend; each has a test that fails without it.
"""

from __future__ import annotations

from typing import Any

import torch

_mended = False


def _keep_bucket_padding() -> None:
    """Distributed-optimizer state of a model whose gradient buffer has padding between buckets.

    A tied embedding at pipeline_model_parallel_size > 1 gets a bucket of its own, padded to lcm(dp, 128).
    ``optimizer/distrib_optimizer.py`` get_parameter_state_dp_zero (:1104) gathers the buckets without that padding, but
    sharded_param_state_fully_reshardable (:1501) cuts parameters out at offsets that count it: every parameter after
    the first bucket is saved shifted, weights and moments alike. The checkpoint loads without a word and is wrong.
    Here the gathered state gets its padding back.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    gather = DistributedOptimizer.get_parameter_state_dp_zero

    def padded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = gather(self, *args, **kwargs)
        for index, buffer in enumerate(self.buffers if state is not None else ()):
            for world in state[index].values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    if key in world:
                        world[key] = _spread(world[key], buffer)
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = padded_state


def _spread(compact: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Values stored bucket after bucket, at the offsets that the buckets have in the padded buffer."""
    if compact.numel() == buffer.numel:
        return compact
    padded = compact.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + size] = compact[start : start + size]
        start += size
    return padded


def mend() -> None:
    """Apply all mends in this process. Safe to call again."""
    global _mended
    if not _mended:
        _keep_bucket_padding()
        _mended = True
