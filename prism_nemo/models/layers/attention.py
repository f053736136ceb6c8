"""Core attention on torch's scaled_dot_product_attention, with the rotary embedding inside.

Megatron-Core's own DotProductAttention materialises the s x s scores, takes a buffer on the CUDA device
(dot_product_attention.py:189) and forks the CUDA generator on every call (:217). This one needs neither and runs the
fused kernel that torch has for the device.

Packed documents of similar length are attended together, as a batch in which each has positions from 0 and nothing but
its own tokens: no document can see another whatever the mask (see `prism_nemo.models.layers.documents`).

The rotary embedding is applied here rather than by Megatron's rope_utils.py:92, because queries and keys are moved to
the kernel's layout at this point anyway: rotating while moving costs two passes over memory instead of seven, forward
and backward alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from prism_nemo.models.layers.context_parallel import repeats, to_heads, to_tokens
from prism_nemo.models.layers.documents import Grouping, documents_of


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, back: bool = False) -> None:
    """Write `x` rotated by the angles, or by minus the angles, to `out`, another tensor of its shape."""
    half, sign = x.shape[-1] // 2, -1.0 if back else 1.0
    first, second = x.split(half, dim=-1)
    out_first, out_second = out.split(half, dim=-1)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin, value=sign)


class RotateToHeads(torch.autograd.Function):
    """Rotate [s, b, h, d] by position and give [b, h, s, d]; the halves of a head form the pairs (Llama's order)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """cos and sin are [s, d / 2]."""
        ctx.save_for_backward(cos, sin)
        s, b, h, d = x.shape
        out = x.new_empty(b, h, s, d)
        _rotate(x.permute(1, 2, 0, 3), cos, sin, out=out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The transpose of a rotation is the rotation by minus the angle."""
        cos, sin = ctx.saved_tensors
        (grad,) = grads
        b, h, s, d = grad.shape
        out = grad.new_empty(s, b, h, d)
        _rotate(grad, cos, sin, out=out.permute(1, 2, 0, 3), back=True)
        return out, None, None


class RowsToGroups(torch.autograd.Function):
    """Rotate queries and keys [t, heads, d] and lay them out, with the values, as `Grouping` says: [rows, d].

    Every token has one place (padding is a copy that nothing depends on), so the gradient is the inverse selection:
    no sums, hence no order of summation and no terms of other documents.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        grouping: Grouping,
    ) -> torch.Tensor:
        """cos and sin are [t, 1, d / 2], or None for no rotation."""
        parts = [x.shape[1] for x in (query, key, value)]
        together = query.new_empty(len(query), sum(parts), query.shape[-1])
        q, k, v = together.split(parts, dim=1)
        if cos is None or sin is None:
            q.copy_(query)
            k.copy_(key)
        else:
            _rotate(query, cos, sin, out=q)
            _rotate(key, cos, sin, out=k)
        v.copy_(value)
        ctx.save_for_backward(cos, sin)
        ctx.places, ctx.parts = grouping.places, parts
        return together.flatten(0, 1).index_select(0, grouping.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Each token's own rows, rotated back."""
        cos, sin = ctx.saved_tensors
        together = grads[0].index_select(0, ctx.places).unflatten(0, (-1, sum(ctx.parts)))
        q, k, v = together.split(ctx.parts, dim=1)
        if cos is None:
            return q, k, v, None, None, None
        turned = torch.empty_like(together[:, : -ctx.parts[2]])
        grad_q, grad_k = turned.split(ctx.parts[:2], dim=1)
        _rotate(q, cos, sin, out=grad_q, back=True)
        _rotate(k, cos, sin, out=grad_k, back=True)
        return grad_q, grad_k, v, None, None, None


class GroupsToRows(torch.autograd.Function):
    """Bring outputs, laid out as `Grouping` says, back to the tokens' order; padding is dropped. [rows, d] each."""

    @staticmethod
    def forward(ctx: Any, grouped: torch.Tensor, grouping: Grouping) -> torch.Tensor:
        """Select each token's rows."""
        ctx.grouping = grouping
        return grouped.index_select(0, grouping.out_places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The rows' gradients at their places, and 0 for padding."""
        grad = grads[0].index_select(0, ctx.grouping.out_rows)
        return grad.index_fill_(0, ctx.grouping.out_padding, 0.0), None


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
        self.context = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None
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
        """A batch of rows of one document each: [s, b, heads or groups, d] -> [s, b, heads * d]."""
        # One contiguous copy: the kernel reads every row many times, and here rows of one head lie kilobytes apart.
        v = value.permute(1, 2, 0, 3).contiguous()
        if self.inv_freq is None:
            q, k = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3)
        else:
            cos, sin = self._cos_sin(query.shape[0], query)
            q, k = RotateToHeads.apply(query, cos, sin), RotateToHeads.apply(key, cos, sin)
        return self._kernel(q, k, v).permute(2, 0, 1, 3).flatten(2)

    def _kernel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention within the window to rotated queries and keys: [b, heads or groups, s, d] -> [b, heads, s, d]."""
        dropout = self.dropout if self.training else 0.0
        if self.window is not None and q.shape[2] > self.window:
            return windowed_attention(q, k, v, window=self.window, scale=self.scale, dropout=dropout)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, dropout_p=dropout, enable_gqa=gqa
        )

    def _attend_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """The documents of one row: [t, heads or groups, d] -> [t, heads * d]."""
        documents = documents_of(packed, len(query))
        (_, heads, d), groups = query.shape, key.shape[1]
        grouping = documents.grouping(heads, groups, d)
        if all(n == 1 for n, _ in grouping.shapes):  # nothing to lay out: long documents lie well where they are
            rows = (x.unsqueeze(1).split(documents.lengths) for x in (query, key, value))
            return torch.cat([self._attend(*parts) for parts in zip(*rows, strict=True)]).squeeze(1)
        cos = sin = None
        if self.inv_freq is not None:
            angles = self._cos_sin(documents.max_seqlen_q, query)
            cos, sin = (x.index_select(0, grouping.positions).unsqueeze(1) for x in angles)
        grouped = RowsToGroups.apply(query, key, value, cos, sin, grouping)
        sizes = [n * length * many for n, length in grouping.shapes for many in (heads, groups, groups)]
        blocks = iter(grouped.split(sizes))
        outputs = []
        for n, length in grouping.shapes:
            q, k, v = (next(blocks).view(n, many, length, d) for many in (heads, groups, groups))
            outputs.append(self._kernel(q, k, v).reshape(-1, d))
        return GroupsToRows.apply(torch.cat(outputs), grouping).view(-1, heads * d)

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
            packed_seq_params: Where the documents of a packed row begin (format "thd"); best made by `pack_documents`.

        Returns:
            [s, b, heads * head_dim], or [t, heads * head_dim] for packed documents.

        With context parallelism s and t are this rank's share, while `packed_seq_params` describes the whole row.
        """
        if attention_bias is not None:
            raise NotImplementedError("attention biases are not supported by SDPACoreAttention")
        if self.context is None:
            return self._attend_rows(query, key, value, packed_seq_params)
        copies = repeats(key.shape[-2], self.context.size())
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=-2) for x in (key, value))
        d = query.shape[-1]
        flat = to_heads([x.flatten(-2) for x in (query, key, value)], self.context)
        query, key, value = (x.unflatten(-1, (-1, d)) for x in flat)
        return to_tokens(self._attend_rows(query, key, value, packed_seq_params), self.context)

    def _attend_rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed_seq_params: PackedSeqParams | None
    ) -> torch.Tensor:
        """Whole rows, some of the heads."""
        if packed_seq_params is None:
            return self._attend(query, key, value)
        return self._attend_documents(query, key, value, packed_seq_params)
