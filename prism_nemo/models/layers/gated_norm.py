"""The gated RMSNorm behind Mamba's recurrence, for groups that may span tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.autograd.function import once_differentiable


class _GatedRMSNorm(torch.autograd.Function):
    """With v = y silu(z) and u = v (sum of v^2 over the group / group_size + eps)^-1/2: out = u w.

    With g = dL/dout: dL/dv = (g w - u sum(g w u) / group_size) (...)^-1/2. Both sums run over the whole group, so where
    it spans ranks each is reduced over them: the second because every rank's loss depends on every rank's v.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, norm: GatedRMSNorm) -> torch.Tensor:
        """y, z: [..., width]; weight: [width]. Computed in fp32 at least and rounded once."""
        kind = torch.promote_types(y.dtype, torch.float32)
        gated = y.to(kind) * F.silu(z.to(kind))
        inverse = torch.rsqrt(norm.group_sum(gated.square()) / norm.group_size + norm.eps)
        normed = norm.times_group(gated, inverse)
        ctx.save_for_backward(y, z, weight, normed, inverse)
        ctx.norm = norm
        return (normed * weight).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        y, z, weight, normed, inverse = ctx.saved_tensors
        norm: GatedRMSNorm = ctx.norm
        grad = grads[0].to(normed.dtype)
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0)
        mean = norm.group_sum(product.mul_(weight)) / norm.group_size
        grad_gated = norm.times_group((grad * weight).sub_(norm.times_group(normed, mean)), inverse)
        wide_z = z.to(normed.dtype)
        grad_y = grad_gated * F.silu(wide_z)
        grad_z = torch.ops.aten.silu_backward(grad_gated.mul_(y), wide_z)
        return grad_y.to(y.dtype), grad_z.to(z.dtype), grad_weight.to(weight.dtype), None


class GatedRMSNorm(torch.nn.Module):
    """Normalise y silu(z) by its root mean square in each group of channels, and scale by a weight.

    Args:
        width: Channels of this rank.
        group_size: Channels of a whole group; divides `width`, or is a multiple of it when a group spans ranks.
        eps: Added to the mean square.
        tp_group: Tensor-parallel process group; the ranks hold consecutive channels.
        dtype: Of the weight.
        device: Of the weight.
    """

    def __init__(
        self, width: int, group_size: int, eps: float, tp_group: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype, device=device))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.group_size, self.eps, self.tp_group = group_size, eps, tp_group
        self.local_groups = max(1, width // group_size)
        self.ranks_per_group = max(1, group_size // width)

    def group_sum(self, t: torch.Tensor) -> torch.Tensor:
        """Sums of [..., width] over each group, [..., local groups]."""
        sums = t.unflatten(-1, (self.local_groups, -1)).sum(-1)
        if self.ranks_per_group == 1:
            return sums
        # One reduction over all ranks, each adding to the column of its group, rather than a process group per group.
        columns = self.tp_group.size() // self.ranks_per_group
        mine = self.tp_group.rank() // self.ranks_per_group
        everyone = sums.new_zeros(*sums.shape[:-1], columns)
        everyone[..., mine] = sums[..., 0]
        dist.all_reduce(everyone, group=self.tp_group)
        return everyone[..., mine : mine + 1]

    def times_group(self, t: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """[..., width] times one number per group, [..., local groups]."""
        return (t.unflatten(-1, (self.local_groups, -1)) * factor.unsqueeze(-1)).flatten(-2)

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """y and its gate z, [..., width] each, to [..., width]."""
        return _GatedRMSNorm.apply(y, z, self.weight, self)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The weight, cut over tensor-parallel ranks."""
        if metadata is None:
            raise ValueError("metadata with the data-parallel group is needed")
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
