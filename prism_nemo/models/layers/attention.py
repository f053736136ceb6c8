"""Core attention on torch's scaled_dot_product_attention, with the rotary embedding inside.

Megatron-Core's own DotProductAttention materialises the s x s scores, takes a buffer on the CUDA device
(dot_product_attention.py:189) and forks the CUDA generator on every call (:217). This one needs neither and runs the
fused kernel that torch has for the device.

The rotary embedding is applied here rather than by Megatron's rope_utils.py:92, because queries and keys are moved to
the kernel's layout at this point anyway: rotating while moving costs two passes over memory instead of seven, forward
and backward alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class RotateToHeads(torch.autograd.Function):
    """Rotate [s, b, h, d] by position and give [b, h, s, d]; the halves of a head form the pairs (Llama's order)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """cos and sin are [s, d / 2]."""
        ctx.save_for_backward(cos, sin)
        s, b, h, d = x.shape
        first, second = x.permute(1, 2, 0, 3).split(d // 2, dim=-1)
        out = x.new_empty(b, h, s, d)
        out_first, out_second = out.split(d // 2, dim=-1)
        torch.mul(first, cos, out=out_first)
        out_first.addcmul_(second, sin, value=-1.0)
        torch.mul(second, cos, out=out_second)
        out_second.addcmul_(first, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The transpose of a rotation is the rotation by minus the angle."""
        cos, sin = ctx.saved_tensors
        (grad,) = grads
        b, h, s, d = grad.shape
        first, second = grad.split(d // 2, dim=-1)
        out = grad.new_empty(s, b, h, d)
        out_first, out_second = out.permute(1, 2, 0, 3).split(d // 2, dim=-1)
        torch.mul(first, cos, out=out_first)
        out_first.addcmul_(second, sin)
        torch.mul(second, cos, out=out_second)
        out_second.addcmul_(first, sin, value=-1.0)
        return out, None, None


class SDPACoreAttention(MegatronModule):
    """Causal attention over [s, b, h, d] tensors, heads already split over tensor-parallel ranks.

    Args:
        inv_freq: Inverse frequencies [d / 2] of the rotary embedding; None where positions are not rotated (Megatron
            has done it, or the model has no positions).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        inv_freq: torch.Tensor | None = None,
    ) -> None:
        super().__init__(config)
        if config.context_parallel_size > 1:
            raise NotImplementedError("context parallelism needs a core attention that exchanges keys and values")
        if attn_mask_type != AttnMaskType.causal:
            raise NotImplementedError(f"attention mask {attn_mask_type} is not supported, only causal")
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.inv_freq = inv_freq
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def _cos_sin(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [s, d / 2] of positions 0..s-1, kept between calls."""
        s = like.shape[0]
        if self._angles is None or self._angles[0].shape[0] < s or self._angles[0].dtype != like.dtype:
            inv_freq = self.inv_freq
            if inv_freq is None:
                raise RuntimeError("no inverse frequencies")
            angles = torch.outer(torch.arange(s, dtype=torch.float32), inv_freq).to(like.device)
            self._angles = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
        cos, sin = self._angles
        return cos[:s], sin[:s]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Rotate and attend causally.

        Args:
            query: [s, b, heads, head_dim].
            key: [s, b, groups, head_dim].
            value: [s, b, groups, head_dim].
            attention_mask: Ignored: the mask is causal by construction.
            attn_mask_type: Must be causal or None.
            attention_bias: Not supported.
            packed_seq_params: Not supported by this slice.

        Returns:
            [s, b, heads * head_dim].
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError("packed sequences and attention biases are not supported by SDPACoreAttention")
        # One contiguous copy: the kernel reads every row many times, and here rows of one head lie kilobytes apart.
        v = value.permute(1, 2, 0, 3).contiguous()
        if self.inv_freq is None:
            q, k = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3)
        else:
            cos, sin = self._cos_sin(query)
            q, k = RotateToHeads.apply(query, cos, sin), RotateToHeads.apply(key, cos, sin)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)
