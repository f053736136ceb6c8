"""Core attention on torch's scaled_dot_product_attention, with the rotary embedding inside.

Megatron-Core's own DotProductAttention materialises the s x s scores, takes a buffer on the CUDA device
(dot_product_attention.py:189) and forks the CUDA generator on every call (:217). This one needs neither and runs the
fused kernel that torch has for the device.

Packed documents are attended one after the other, each with positions from 0: four to seven times as fast on CPU as one
masked attention over the row, and no document can see another whatever the mask.

The rotary embedding is applied here rather than by Megatron's rope_utils.py:92, because queries and keys are moved to
the kernel's layout at this point anyway: rotating while moving costs two passes over memory instead of seven, forward
and backward alike.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
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


def windowed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int, scale: float | None, dropout: float
) -> torch.Tensor:
    """Causal attention to the last `window` positions, the token itself included.

    Blocks of queries attend to the keys that any of them may see, so that work and memory grow with s x window and not
    with s x s.

    Args:
        q: [b, heads, s, d].
        k: [b, groups, s, d].
        v: [b, groups, s, d].
        window: Positions that a token sees (Hugging Face's ``sliding_window``).
        scale: Of the scores; None for d^-1/2.
        dropout: Probability.

    Returns:
        [b, heads, s, d].
    """
    s = q.shape[2]
    block = max(window, 128)
    parts = []
    for start in range(0, s, block):
        end, first = min(start + block, s), max(0, start - window + 1)
        i = torch.arange(start, end, device=q.device)[:, None]
        j = torch.arange(first, end, device=q.device)[None]
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, first:end],
                v[:, :, first:end],
                attn_mask=(j <= i) & (i - j < window),
                scale=scale,
                dropout_p=dropout,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(parts, dim=2)


class SDPACoreAttention(MegatronModule):
    """Causal attention over [s, b, h, d] tensors, heads already split over tensor-parallel ranks.

    The window is Megatron's ``config.window_size``: (positions to the left of the token, 0).

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
        self.window = None if config.window_size is None else config.window_size[0] + 1
        self.inv_freq = inv_freq
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def _cos_sin(self, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [length, d / 2] of positions 0..length-1, kept between calls."""
        if self._angles is None or self._angles[0].shape[0] < length or self._angles[0].dtype != like.dtype:
            inv_freq = self.inv_freq
            if inv_freq is None:
                raise RuntimeError("no inverse frequencies")
            angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq).to(like.device)
            self._angles = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
        cos, sin = self._angles
        return cos[:length], sin[:length]

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One document, or a batch of equally long ones: [s, b, heads or groups, d] -> [s, b, heads * d]."""
        # One contiguous copy: the kernel reads every row many times, and here rows of one head lie kilobytes apart.
        v = value.permute(1, 2, 0, 3).contiguous()
        if self.inv_freq is None:
            q, k = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3)
        else:
            cos, sin = self._cos_sin(query.shape[0], query)
            q, k = RotateToHeads.apply(query, cos, sin), RotateToHeads.apply(key, cos, sin)
        dropout = self.dropout if self.training else 0.0
        if self.window is not None and q.shape[2] > self.window:
            out = windowed_attention(q, k, v, window=self.window, scale=self.scale, dropout=dropout)
        else:
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, dropout_p=dropout, enable_gqa=gqa
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Rotate and attend causally, inside each document.

        Args:
            query: [s, b, heads, head_dim]; [t, heads, head_dim] for packed documents (and key and value alike).
            key: [s, b, groups, head_dim].
            value: [s, b, groups, head_dim].
            attention_mask: Ignored: the mask is causal by construction.
            attn_mask_type: Must be causal or None.
            attention_bias: Not supported.
            packed_seq_params: Where the documents of a packed row begin (``cu_seqlens_q``, format "thd").

        Returns:
            [s, b, heads * head_dim], or [t, heads * head_dim] for packed documents.
        """
        if attention_bias is not None:
            raise NotImplementedError("attention biases are not supported by SDPACoreAttention")
        if packed_seq_params is None:
            return self._attend(query, key, value)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        if bounds[0] != 0 or bounds[-1] != query.shape[0]:
            raise ValueError(f"documents end at {bounds[-1]}, but the row has {query.shape[0]} tokens")
        documents = [
            self._attend(*(x[first:last].unsqueeze(1) for x in (query, key, value)))
            for first, last in pairwise(bounds)
            if last > first
        ]
        return torch.cat(documents).squeeze(1)
