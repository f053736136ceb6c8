"""Cross entropy over a vocabulary that is split over tensor-parallel ranks, in few passes over the logits.

Same mathematics as Megatron's tensor_parallel/cross_entropy.py, which finds the row maximum together with its index
(five times slower on CPU) and divides all of the exponentials in the forward pass. Here the division waits for the
backward pass, where it is one with the gradient's scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


class VocabParallelCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] for logits [..., vocab / tp] and targets [...] in the whole vocabulary.

    The logits are used up as working memory, forward and backward, as in Megatron: nothing else may read them, and
    the graph can be run backward once.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss [...], equal on every tensor-parallel rank."""
        group = parallel_state.get_tensor_model_parallel_group()
        rows = logits.shape[-1]
        largest = logits.amax(dim=-1)
        local = target - rows * group.rank()
        if group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            elsewhere = (local < 0) | (local >= rows)
            local = local.masked_fill(elsewhere, 0)
        shifted = logits.sub_(largest.unsqueeze(-1))
        picked = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1)
        exponentials = shifted.exp_()
        total = exponentials.sum(dim=-1)
        mine: torch.Tensor | None = None
        if group.size() > 1:
            picked = picked.masked_fill(elsewhere, 0.0)
            mine = (~elsewhere).to(logits.dtype)
            both = torch.stack([picked, total])
            dist.all_reduce(both, group=group)
            picked, total = both.unbind(0)
        ctx.save_for_backward(exponentials, total, local, mine)
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(softmax - one-hot) times the gradient."""
        (grad,) = grads
        exponentials, total, local, mine = ctx.saved_tensors
        out = exponentials.mul_((grad / total).unsqueeze(-1))
        taken = grad if mine is None else grad * mine
        out.scatter_add_(-1, local.unsqueeze(-1), -taken.unsqueeze(-1))
        return out, None
