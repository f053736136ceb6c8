"""Scales of the FP8 recipes, with Transformer Engine's arithmetic (2.10), special cases included.

A tensor is multiplied by its scale in fp32, rounded to the format, and multiplied by the inverse where it is used. The
recipes differ in what shares a scale and in where the largest magnitude ("amax") comes from:

- ``tensorwise``: one scale per tensor, from the tensor itself (Float8CurrentScaling);
- ``delayed``: one per tensor, from the amaxes of earlier passes (DelayedScaling; `DelayedScale` keeps them);
- ``blockwise``: one per 1 x 128 of activations and gradients along the summed dimension, one per 128 x 128 of weights,
  powers of two (Float8BlockScaling; fp32 scales are its other choice);
- ``mxfp8``: one power of two per 1 x 32 of everything along the summed dimension (MXFP8BlockScaling, OCP MX v1.0).

Sources: TE common/recipe/recipe_common.cuh (compute_scale_from_amax), pytorch/quantization.py (_default_sf_compute,
_update_amax_history), common/util/ptx.cuh (float_to_e8m0, exp2f_rcp). Written anew from the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.precision.formats import Format, round_to

BLOCK = 128
MX_BLOCK = 32
_FP32_MAX = torch.finfo(torch.float32).max


def _quotient(amax: torch.Tensor, form: Format) -> torch.Tensor:
    """largest / amax, rounded once: torch computes number / tensor as the number times a rounded reciprocal."""
    return torch.div(torch.full_like(amax, form.largest), amax)


def scale_of(amax: torch.Tensor, form: Format, power_of_2: bool = False) -> torch.Tensor:
    """largest / amax, elementwise in fp32; 1 where amax is 0 or not finite; rounded down to a power of two if asked."""
    scale = _quotient(amax, form).clamp(max=_FP32_MAX)  # of an amax so small that the quotient overflows
    if power_of_2:
        scale = scale.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def mx_exponent(amax: torch.Tensor, form: Format) -> torch.Tensor:
    """Biased exponent (E8M0, int32) of the inverse scale: amax / largest rounded up to a power of two.

    254 for infinity, 255 for NaN. Up, so that no number of the block saturates.
    """
    ratio = amax * torch.tensor(1.0 / form.largest, dtype=torch.float32)
    bits = ratio.contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent < 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = exponent + up
    return torch.where(ratio.isnan(), 0xFF, torch.where(ratio.isinf(), 0xFE, exponent)).int()


def quantise_tensor(x: torch.Tensor, form: Format, scale: torch.Tensor) -> torch.Tensor:
    """`x` as it reads after quantisation with this one scale. fp32 in and out."""
    return round_to(x * scale, form) * scale.reciprocal()


def quantise_current(x: torch.Tensor, form: Format) -> torch.Tensor:
    """With one scale from the tensor's own amax."""
    return quantise_tensor(x, form, scale_of(x.abs().amax(), form))


def _in_blocks(
    x: torch.Tensor, size: int, dim: int, quantise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply `quantise(blocks [r, n, size], amax [r, n, 1])` along a dimension of [rows, columns]; a last short block
    is as if filled with zeros."""
    rows = x.t() if dim == 0 else x
    length = rows.shape[1]
    padded = torch.nn.functional.pad(rows, (0, -length % size)).contiguous().view(len(rows), -1, size)
    out = quantise(padded, padded.abs().amax(-1, keepdim=True)).view(len(rows), -1)[:, :length]
    return (out.t() if dim == 0 else out).contiguous()


def quantise_rows(x: torch.Tensor, form: Format, dim: int, power_of_2: bool = True) -> torch.Tensor:
    """With one scale per `BLOCK` numbers along a dimension of [rows, columns]."""

    def quantise(blocks: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        return quantise_tensor(blocks, form, scale_of(amax, form, power_of_2))

    return _in_blocks(x, BLOCK, dim, quantise)


def quantise_squares(x: torch.Tensor, form: Format, power_of_2: bool = True) -> torch.Tensor:
    """With one scale per `BLOCK` x `BLOCK` of [rows, columns]; the transpose has the same scales."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = scale_of(blocks.abs().amax((1, 3), keepdim=True), form, power_of_2)
    return quantise_tensor(blocks, form, scale).view(padded.shape)[:rows, :columns].contiguous()


def quantise_mx(x: torch.Tensor, form: Format, dim: int) -> torch.Tensor:
    """With one power of two per `MX_BLOCK` numbers along a dimension of [rows, columns]."""

    def quantise(blocks: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        exponent = mx_exponent(amax, form)
        inverse = torch.ldexp(torch.ones_like(amax), exponent - 127)
        # Exponent 0 stands for "nothing here": TE then multiplies by 1, and numbers that small become 0.
        scale = torch.where(exponent == 0, 1.0, torch.ldexp(torch.ones_like(amax), 127 - exponent))
        inverse = torch.where(exponent == 0xFF, torch.nan, inverse)
        return round_to(blocks * scale, form) * inverse

    return _in_blocks(x, MX_BLOCK, dim, quantise)


class DelayedScale:
    """One tensor's scale, from the amaxes of the passes before: the first pass has scale 1.

    Args:
        form: Format of the tensor.
        margin: The scale is divided by two to this power.
        length: Passes that the history holds, the latest included.
        algorithm: ``most_recent`` or ``max`` of the history.
        device: Where the scale is used.
    """

    def __init__(self, form: Format, margin: int, length: int, algorithm: str, device: torch.device) -> None:
        self.form, self.margin, self.algorithm = form, margin, algorithm
        self.history = torch.zeros(length, device=device)  # latest first
        self.scale = torch.ones((), device=device)

    def observe(self, x: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        """Record the amax of a pass, the largest over the group, and set the scale of the next pass."""
        amax = x.abs().amax().float()
        if group is not None and group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        self.history = torch.cat((amax.view(1), self.history[:-1]))
        if self.algorithm == "max":
            amax = self.history.amax()
        scale = (_quotient(amax, self.form) / 2.0**self.margin).clamp(max=_FP32_MAX)
        self.scale = torch.where((amax > 0) & amax.isfinite(), scale, self.scale)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it."""
        return {"history": self.history.cpu(), "scale": self.scale.cpu()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's state; a history of another length is cut or continued with zeros."""
        length, device = len(self.history), self.history.device
        kept = state["history"].to(device)[:length]
        self.history = torch.nn.functional.pad(kept, (0, length - len(kept)))
        self.scale = state["scale"].to(device)
