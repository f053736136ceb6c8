"""Attention over whole rows (format "sbhd") and over documents in one row ("thd")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..module.base import TransformerEngineBaseModule
from . import rope

__all__ = ["DotProductAttention", "rope"]


class DotProductAttention(TransformerEngineBaseModule):
    """Softmax attention. A token sees itself and, with a window of (left, 0), no more than `left` tokens before it."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
    ) -> None:
        super().__init__()
        if attention_dropout or attention_type != "self" or softmax_type != "vanilla" or return_max_logit:
            raise NotImplementedError
        self.window = window_size or (-1, -1)
        self.scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.heads, self.groups = num_attention_heads // tp_size, (num_gqa_groups or num_attention_heads) // tp_size
        self.qkv_format = qkv_format

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """[s, b, h, d] to [s, b, h * d], or [t, h, d] to [t, h * d]."""
        if window_size is not None or attention_mask is not None:
            raise NotImplementedError
        packed = (qkv_format or self.qkv_format) == "thd"
        if attn_mask_type != ("padding_causal" if packed else "causal"):
            raise ValueError(attn_mask_type)
        q, k, v = ((x[:, None] if packed else x).permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
        if (q.shape[1], k.shape[1]) != (self.heads, self.groups):
            raise ValueError(f"{q.shape[1]} and {k.shape[1]} heads, made for {self.heads} and {self.groups}")
        place = torch.arange(q.shape[2])
        sees = place[:, None] >= place
        if self.window[0] >= 0:
            sees &= place[:, None] - place <= self.window[0]
        if packed:
            if cu_seqlens_q is None or cu_seqlens_kv is None or not torch.equal(cu_seqlens_q, cu_seqlens_kv):
                raise ValueError("where the documents begin is not given, or not the same for queries and keys")
            lengths = cu_seqlens_q.diff()
            if lengths.max() > (max_seqlen_q or 0) or lengths.sum() != len(place):
                raise ValueError("documents are longer than the longest, or do not fill the row")
            document = torch.repeat_interleave(torch.arange(len(lengths)), lengths.long())
            sees &= document[:, None] == document
        k, v = (x.repeat_interleave(self.heads // self.groups, 1) for x in (k, v))
        scores = (q @ k.transpose(2, 3) * self.scale).float().masked_fill(~sees, -torch.inf)
        out = (scores.softmax(-1).to(v.dtype) @ v).permute(2, 0, 1, 3).flatten(2)
        return out[:, 0] if packed else out
