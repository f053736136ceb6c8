"""The two FP8 formats, and rounding to them in ordinary arithmetic.

Formats as in "FP8 Formats for Deep Learning" (arXiv 2209.05433): E4M3 has no infinities and one NaN, so its largest
number is 448; E5M2 follows IEEE 754, largest finite number 57344. Rounding is to nearest, ties to even, and numbers
above the largest become the largest, as the GPU's ``cvt.rn.satfinite`` does for Transformer Engine. torch's own casts
differ in that respect: 2.13 saturates E4M3 (earlier versions give NaN) and overflows E5M2 to infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_EXPONENT_BITS = 0x7F800000  # of an fp32


@dataclass(frozen=True)
class Format:
    """An FP8 format.

    Attributes:
        name: As NVIDIA spells it, in lower case.
        mantissa_bits: Stored bits of the mantissa.
        min_exponent: Of the smallest normal number; below it the spacing stays.
        largest: Largest finite number.
        dtype: torch's type of the same format.
    """

    name: str
    mantissa_bits: int
    min_exponent: int
    largest: float
    dtype: torch.dtype

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a normal number."""
        return 2.0 ** -(self.mantissa_bits + 1)

    @property
    def smallest(self) -> float:
        """Smallest positive number (a subnormal); rounding moves a subnormal by at most half of it."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)


E4M3 = Format("e4m3", 3, -6, 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 2, -14, 57344.0, torch.float8_e5m2)


def round_to(x: torch.Tensor, form: Format) -> torch.Tensor:
    """The nearest numbers of the format, ties to even, saturating.

    Args:
        x: fp32, any shape; not changed.
        form: The format.

    Returns:
        fp32 numbers that the format represents. NaN stays NaN, -0 stays -0, infinities become the largest number.
    """
    x = x.clamp(-form.largest, form.largest)
    # The power of two at or below |x|: its bits without sign and mantissa. All steps that follow are exact.
    spacing = x.view(torch.int32).bitwise_and(_EXPONENT_BITS).view(torch.float32)
    spacing.clamp_(min=2.0**form.min_exponent).mul_(2.0**-form.mantissa_bits)
    return x.div_(spacing).round_().mul_(spacing)
