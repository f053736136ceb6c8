"""Depthwise causal convolution followed by silu, as in front of Mamba's recurrence, tap by tap in [b, l, c] layout.

torch's conv1d wants [b, c, l], which costs two transpositions, and knows no documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from prism_nemo.models.layers.ssd import document_runs


def _taps(x: torch.Tensor, runs: torch.Tensor | None, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(k, what the tap k tokens back reads for tokens k.. of x) for each tap but the token's own."""
    for back in range(1, min(width, x.shape[1])):
        source = x[:, :-back]
        if runs is not None:
            source = source * (runs[:, back:] == runs[:, :-back]).unsqueeze(-1)
        yield back, source


class _CausalConv(torch.autograd.Function):
    """silu(conv(x)); the sum before silu is kept, everything else is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, runs: torch.Tensor | None
    ) -> torch.Tensor:
        """weight is [c, k]."""
        width = weight.shape[1]
        out = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
        for back, source in _taps(x, runs, width):
            out[:, back:].addcmul_(source, weight[:, -1 - back])
        ctx.save_for_backward(x, weight, bias, runs, out)
        return F.silu(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, runs, out = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grads[0], out)
        grad_x = grad * weight[:, -1]
        grad_weight = torch.zeros_like(weight)
        grad_weight[:, -1] = (grad * x).sum((0, 1))
        for back, source in _taps(x, runs, weight.shape[1]):
            later = grad[:, back:]
            grad_weight[:, -1 - back] = (later * source).sum((0, 1))
            if runs is not None:
                later = later * (runs[:, back:] == runs[:, :-back]).unsqueeze(-1)
            grad_x[:, :-back].addcmul_(later, weight[:, -1 - back])
        return grad_x, grad_weight, None if bias is None else grad.sum((0, 1)), None


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, seq_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(bias + sum over k of weight[:, k] x[t - (width - 1) + k]), for each channel by itself.

    Args:
        x: [b, l, c].
        weight: [c, 1, width], as nn.Conv1d holds it; the last column is the token's own.
        bias: [c] or None.
        seq_idx: Index [b, l] of each token's document; taps that would reach into another document read zeros.

    Returns:
        [b, l, c].
    """
    return _CausalConv.apply(x, weight.squeeze(1), bias, None if seq_idx is None else document_runs(seq_idx))


def causal_conv_step(
    window: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`causal_conv` for one more token, for decoding.

    Args:
        window: [b, width - 1, c], the inputs before this one, oldest first (zeros before the start); moved on in place.
        x: [b, c].
        weight: [c, 1, width].
        bias: [c] or None.

    Returns:
        [b, c].
    """
    inputs = torch.cat((window, x.unsqueeze(1)), dim=1)
    window.copy_(inputs[:, 1:])
    out = (inputs * weight.squeeze(1).T).sum(1)
    return F.silu(out if bias is None else out + bias)
