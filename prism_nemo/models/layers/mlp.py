"""SwiGLU in as few passes over memory as torch's kernels allow.

Megatron's unfused path (mlp.py:233) adds a zero offset to the linear half, and autograd stitches the two halves'
gradients together with another copy; its fused path needs a compiler at run time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up for [..., 2 f] = [gate, up]; the gradient is written into one buffer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """[..., 2 f] -> [..., f]."""
        gate, up = x.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """d silu(g) u = (u silu'(g), silu(g))."""
        (grad,) = grads
        x, activated = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        out_gate, out_up = out.chunk(2, dim=-1)
        torch.mul(grad, activated, out=out_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=out_gate)
        return out


class GatedMLP(MLP):
    """Megatron's MLP with `SwiGLU` between its two linear layers."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """[s, b, h] -> ([s, b, h], bias)."""
        intermediate, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(SwiGLU.apply(intermediate))
