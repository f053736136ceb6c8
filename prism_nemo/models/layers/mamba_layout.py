"""How tensor parallelism cuts the heads and groups of a Mamba-2 mixer, and what its replicated weights need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.errors import InputError
from prism_nemo.models.family import mamba_fits


@dataclass(frozen=True)
class MambaLayout:
    """Sizes of a mixer, whole and on one tensor-parallel rank.

    Ranks hold consecutive heads; each group of B and C serves heads / groups consecutive heads. With a multiple of `tp`
    groups, B and C are cut like the heads. With fewer groups than ranks, several ranks need the same group and B and C
    are replicated.

    Attributes:
        heads: Heads of the whole mixer.
        head_dim: Channels of a head, p.
        groups: Groups of the whole mixer.
        d_state: Size of B and C per group, n.
        tp: Tensor-parallel ranks.
        rank: This one.

    Raises:
        InputError: If the heads or groups cannot be cut into `tp` parts.
    """

    heads: int
    head_dim: int
    groups: int
    d_state: int
    tp: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise InputError(f"Mamba: {self.heads} heads cannot be shared out among {self.groups} groups")
        if not self._fits(self.tp):
            fitting = [tp for tp in range(1, self.heads + 1) if self._fits(tp)]
            raise InputError(
                f"tensor_model_parallel_size {self.tp} does not fit a Mamba mixer with {self.heads} heads and "
                f"{self.groups} groups; {', '.join(map(str, fitting))} would"
            )

    def _fits(self, tp: int) -> bool:
        return mamba_fits(self.heads, self.groups, tp)

    @property
    def replicated(self) -> bool:
        """Whether every rank has its own copy of what makes B and C."""
        return self.groups % self.tp != 0

    @property
    def local_heads(self) -> int:
        """Heads of this rank."""
        return self.heads // self.tp

    @property
    def local_groups(self) -> int:
        """Groups that this rank's heads use."""
        return max(1, self.groups // self.tp)

    @property
    def rows(self) -> tuple[int, int, int, int, int]:
        """Rows of z, x, B, C and dt in the whole input projection."""
        inner, bc = self.heads * self.head_dim, self.groups * self.d_state
        return inner, inner, bc, bc, self.heads

    @property
    def local_rows(self) -> tuple[int, int, int, int, int]:
        """Rows of z, x, B, C and dt that this rank computes with."""
        inner, bc = self.local_heads * self.head_dim, self.local_groups * self.d_state
        return inner, inner, bc, bc, self.local_heads

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """By module of this rank, the parts of its weight (and bias) in order, with their rows."""
        z, x, B, C, dt = self.local_rows
        if not self.replicated:
            return {"in_proj": {"z": z, "x": x, "B": B, "C": C, "dt": dt}, "conv1d": {"x": x, "B": B, "C": C}}
        copied = {"B": self.rows[2], "C": self.rows[3]}
        return {
            "in_proj": {"z": z, "x": x, "dt": dt},
            "conv1d": {"x": x},
            "in_proj_bc": copied,
            "conv1d_bc": copied,
        }

    def cut(self, *parts: torch.Tensor) -> torch.Tensor:
        """This rank's share of each part, one after another."""
        return torch.cat([part.chunk(self.tp)[self.rank] for part in parts])

    def own_groups(self, bc: torch.Tensor) -> torch.Tensor:
        """The rows of this rank's groups out of [B, C] of all groups, [2 groups n, ...] -> [2 local_groups n, ...]."""
        first = self.rank * self.groups // self.tp
        mine = bc.unflatten(0, (2, self.groups, self.d_state))[:, first : first + self.local_groups]
        return mine.flatten(0, 2)


class LayerWeights(torch.nn.Module):
    """A weight and, where there is one, a bias, under the names that a linear layer or nn.Conv1d gives them.

    Args:
        values: The weight, or the weight and the bias.
        parallel: Whether they are one rank's share. Megatron's gradient norm counts others on the first rank only.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(self, values: list[torch.Tensor], parallel: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(values[0])
        self.register_parameter("bias", torch.nn.Parameter(values[1]) if len(values) > 1 else None)
        for parameter in self.parameters():
            parameter.tensor_model_parallel = parallel  # type: ignore[attr-defined]


class SumGradients(torch.autograd.Function):
    """Replicated weights as they are; their gradients, of which each rank has a part, summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, group: Any, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=ctx.group)
        parts = flat.split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))
