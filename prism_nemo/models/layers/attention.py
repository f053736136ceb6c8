"""Core attention on torch's scaled_dot_product_attention.

Megatron-Core's own DotProductAttention materialises the s x s scores, takes a buffer on the CUDA device
(dot_product_attention.py:189) and forks the CUDA generator on every call (:217). This one needs neither and runs the
fused kernel that torch has for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class SDPACoreAttention(MegatronModule):
    """Causal attention over [s, b, h, d] tensors, heads already split over tensor-parallel ranks."""

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
    ) -> None:
        super().__init__(config)
        if config.context_parallel_size > 1:
            raise NotImplementedError("context parallelism needs a core attention that exchanges keys and values")
        if attn_mask_type != AttnMaskType.causal:
            raise NotImplementedError(f"attention mask {attn_mask_type} is not supported, only causal")
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

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
        """Attend causally.

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
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if q.shape[1] != k.shape[1]:
            # torch's CPU flash kernel takes the slow path for enable_gqa; repeating the (small) K and V keeps it fused.
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, dropout_p=self.dropout if self.training else 0.0
        )
        return out.permute(2, 0, 1, 3).flatten(2)
