"""On tensors without memory, the operators that a GPU would run in place of torch's fallbacks.

torch answers attention and norms on its meta device with chains of elementary operators, which keep s x s scores and
copies in fp32 that no GPU run keeps; Mamba's published kernels do not run there at all. Here attention and norms go to
the operators that torch has for a GPU, and Mamba's to stand-ins that keep the tensors that the published ones keep and
do matrix products of the same sizes. Nothing is computed: shapes, FLOPs and kept tensors are what is wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from prism_nemo.models.layers import mamba_kernels


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None, **_: Any) -> torch.Tensor:
    """Flash attention. A mask (only the window's, by block) is passed over: kernels that know windows keep none."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]


def _norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float | None = None) -> torch.Tensor:
    return _Norm.apply(x, weight)


def _tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Megatron passes the kind of attention mask as a number in a tensor, and reads it back."""
    return _TENSOR(*args, **{"device": "cpu", **kwargs})


_TENSOR = torch.tensor


class _Norm(torch.autograd.Function):
    """torch's fused RMSNorm, which a GPU has and the meta device takes apart: keeps its input and 1/rms."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Conv(torch.autograd.Function):
    """``causal_conv1d_fn``: keeps its input (made contiguous) and its weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.contiguous()
        ctx.save_for_backward(rows, weight, bias)
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if t is None else torch.empty_like(t) for t in ctx.saved_tensors)


class _Scan(torch.autograd.Function):
    """``mamba_chunk_scan_combined`` (mamba_ssm 2.3.2, ops/triton/ssd_combined.py:603): keeps its output, its inputs and
    the summed decays of each chunk, not the states, and computes those and the scores again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        dt_bias: torch.Tensor,
        chunk_size: int,
    ) -> torch.Tensor:
        b, length, h, _ = x.shape
        chunks = -(-length // chunk_size)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        sums = x.new_empty(b, h, chunks, chunk_size, dtype=torch.float32)
        ctx.save_for_backward(out, x, dt, sums, A, B, C, D, dt_bias)
        ctx.chunk_size = chunk_size
        _chunk_products(x, B, chunk_size)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, x, dt, _, A, B, C, D, dt_bias = ctx.saved_tensors
        for _ in range(2):  # a product's gradient is two products of its size
            _chunk_products(x, B, ctx.chunk_size)
        return (*(torch.empty_like(t) for t in (x, dt, A, B, C, D, dt_bias)), None)


def _chunk_products(x: torch.Tensor, B: torch.Tensor, chunk_size: int) -> None:
    """The matrix products of a scan's forward pass: see `prism_nemo.planning.flops.scan_flops`."""
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    for q, count in ((chunk_size, length // chunk_size), (length % chunk_size, 1)):
        if q and count:
            many = b * count
            inputs, state = x.new_empty(many * h, q, p), x.new_empty(many * g, n, h // g * p)
            rows = x.new_empty(many * g, q, n)
            scores = torch.bmm(rows, rows.mT)
            torch.bmm(x.new_empty(many * h, q, q), inputs)
            torch.bmm(rows, state)
            torch.bmm(rows.mT, scores.new_empty(many * g, q, h // g * p))


def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *_: Any, **__: Any) -> torch.Tensor:
    return _Conv.apply(x, weight.squeeze(1), bias)


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    *,
    dt_bias: torch.Tensor,
    chunk_size: int,
    **_: Any,
) -> torch.Tensor:
    return _Scan.apply(x, dt, A, B, C, D, dt_bias.float(), chunk_size)


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    """While open, models on the meta device run these."""
    # Functions, not a torch function mode: torch sets such a mode aside where a checkpoint computes its pass again.
    places: list[tuple[Any, str, Any]] = [
        (F, "scaled_dot_product_attention", _attention),
        (F, "rms_norm", _norm),
        (torch, "tensor", _tensor),
        (mamba_kernels, "conv", _conv),
        (mamba_kernels, "scan", _scan),
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, function in places:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, before, strict=True):
            setattr(module, name, function)
