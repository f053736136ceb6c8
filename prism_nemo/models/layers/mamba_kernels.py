"""Which kernels run Mamba's convolution and recurrence: the published CUDA ones where they are, torch's elsewhere.

``mamba_ssm`` and ``causal_conv1d`` are looked for only when a CUDA tensor arrives. Both compute what
`prism_nemo.models.layers.ssd` and `prism_nemo.models.layers.causal_conv` compute.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from prism_nemo.models.layers.causal_conv import causal_conv
from prism_nemo.models.layers.ssd import ssd_scan


@functools.cache
def _published(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:  # also what an extension built for another torch raises
        return None


def conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq_idx: torch.Tensor | None
) -> torch.Tensor:
    """`causal_conv` on [b, l, c]."""
    # The published kernel is compiled for these widths, and with documents for channels in eights.
    if x.is_cuda and weight.shape[-1] in (2, 3, 4) and x.shape[-1] % 8 == 0:
        kernel = _published("causal_conv1d", "causal_conv1d_fn")
        if kernel is not None:
            # A transposed view of contiguous [b, l, c]: the layout in which the kernel knows documents.
            rows = x.contiguous().transpose(1, 2)
            return kernel(rows, weight.squeeze(1), bias, seq_idx=seq_idx, activation="silu").transpose(1, 2)
    return causal_conv(x, weight, bias, seq_idx=seq_idx)


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    *,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    chunk_size: int,
    seq_idx: torch.Tensor | None,
) -> torch.Tensor:
    """`ssd_scan` after dt = clamp(softplus(dt + dt_bias), *dt_limit), without its final state.

    Args:
        x: [b, l, h, p].
        dt: [b, l, h], as the projection gives it.
        A: [h], negative.
        B: [b, l, g, n].
        C: [b, l, g, n].
        D: [h].
        dt_bias: [h].
        dt_limit: Lowest and highest dt.
        chunk_size: Tokens per chunk.
        seq_idx: Index [b, l], int32, of each token's document.

    Returns:
        [b, l, h, p].
    """
    if x.is_cuda:
        kernel = _published("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        if kernel is not None:
            options = {"dt_bias": dt_bias.float(), "dt_softplus": True, "dt_limit": dt_limit, "seq_idx": seq_idx}
            return kernel(x, dt, A, B, C, chunk_size, D=D, **options)
    dt = positive_dt(dt, dt_bias, dt_limit)
    return ssd_scan(x, dt, A, B, C, D, chunk_size=chunk_size, seq_idx=seq_idx)[0]


def positive_dt(dt: torch.Tensor, dt_bias: torch.Tensor, dt_limit: tuple[float, float]) -> torch.Tensor:
    """clamp(softplus(dt + dt_bias), *dt_limit), [..., h], in fp32 at least."""
    kind = torch.promote_types(dt.dtype, torch.float32)
    dt = F.softplus(dt.to(kind) + dt_bias.to(kind))
    return dt if dt_limit == (0.0, float("inf")) else dt.clamp(*dt_limit)
