"""RMSNorm that knows sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class _RMSNorm(torch.autograd.Function):
    """torch's rms_norm on CPU is a chain of elementwise kernels whose backward makes some twenty passes; this, seven.

    y = x r w with r = (mean(x^2) + eps)^-1/2, so with g = dL/dy:
    dL/dx = r (g w - x r^2 mean(g w x)) and dL/dw = sum over rows of g x r.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (grad,) = grads
        normed, inverse, weight = ctx.saved_tensors
        product = grad * normed
        flat = product.reshape(-1, product.shape[-1])
        # mean over the row of g w (x r): one matrix-vector product instead of two passes.
        mean = (flat @ weight).div_(product.shape[-1]).view(*product.shape[:-1], 1)
        grad_x = (grad * weight).addcmul_(normed, mean, value=-1.0).mul_(inverse)
        return grad_x, flat.sum(dim=0), None


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for Megatron specs.

    Megatron's WrappedTorchNorm refuses sequence parallelism (torch_norm.py:32). There each rank normalises its share of
    the sequence with the same weight, so the weight's gradient must be summed over tensor-parallel ranks: the attribute
    ``sequence_parallel`` asks ``finalize_model_grads`` to do it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]; in fp32 through the short backward, otherwise torch's own."""
        if x.dtype == torch.float32 and x.device.type == "cpu":
            return _RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)
