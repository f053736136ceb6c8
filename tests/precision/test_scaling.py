"""Scales and block quantisation against naive computations of their own, in fp64 with torch's float8 casts."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.precision.formats import E4M3, E5M2, Format
from prism_nemo.precision.scaling import (
    DelayedScale,
    mx_exponent,
    quantise_current,
    quantise_mx,
    quantise_rows,
    quantise_squares,
    scale_of,
)

FORMATS = pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda f: f.name)


def spread(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Numbers over many powers of two, so that blocks differ in scale and hold subnormals; some zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.exp2(torch.randint(-14, 14, (rows, columns), generator=g))
    return x * (torch.rand(rows, columns, generator=g) > 0.05)


def cast(x: torch.Tensor, scale: float, form: Format) -> torch.Tensor:
    """Quantise by torch's cast and read back: what one block should be. fp32 products, as on the GPU."""
    scaled = (x * torch.tensor(scale, dtype=torch.float32)).clamp(-form.largest, form.largest)
    return scaled.to(form.dtype).float() * (torch.tensor(1.0) / torch.tensor(scale, dtype=torch.float32))


def expected_scale(amax: float, form: Format, power_of_2: bool) -> float:
    """largest / amax in fp32, by numpy."""
    if amax == 0.0:
        return 1.0
    scale = np.float32(form.largest) / np.float32(amax)
    return 2.0 ** (math.frexp(float(scale))[1] - 1) if power_of_2 else float(scale)


def expected_mx_exponent(amax: float, form: Format) -> int:
    """ceil(log2) of the fp32 product, by the number's exponent and mantissa."""
    ratio = float(np.float32(amax) * np.float32(1.0 / form.largest))
    if ratio == 0.0:
        return 0
    mantissa, exponent = math.frexp(ratio)  # ratio = mantissa * 2^exponent, mantissa in [0.5, 1)
    return exponent - (mantissa == 0.5) + 127


@FORMATS
@pytest.mark.parametrize("power_of_2", [False, True])
def test_scale_of(form: Format, power_of_2: bool) -> None:
    amaxes = torch.tensor([1.0, 448.0, 0.3, 1e-30, 7e20, 57344.0, 3.0, 0.0])
    expected = [expected_scale(a, form, power_of_2) for a in amaxes.tolist()]
    assert scale_of(amaxes, form, power_of_2).tolist() == expected
    # Nothing can be said of infinity and NaN; a quotient that overflows becomes the largest fp32 number.
    strange = scale_of(torch.tensor([torch.inf, torch.nan, 1e-44]), form, power_of_2).tolist()
    largest = 2.0**127 if power_of_2 else torch.finfo(torch.float32).max
    assert strange == [1.0, 1.0, largest]


@FORMATS
def test_mx_exponent(form: Format) -> None:
    amaxes = [1.0, form.largest, form.largest * 2**-20, form.largest * 1.0001, 0.3, 3e-20, 5e30, 0.0]
    found = mx_exponent(torch.tensor(amaxes), form).tolist()
    assert found == [expected_mx_exponent(a, form) for a in amaxes]
    assert mx_exponent(torch.tensor([torch.inf, torch.nan]), form).tolist() == [254, 255]
    assert mx_exponent(torch.tensor([form.largest, form.largest * 1.0001]), form).tolist() == [127, 128]


@FORMATS
@pytest.mark.parametrize("shape", [(3, 256), (5, 300), (130, 7)])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_block_by_block(form: Format, shape: tuple[int, int], dim: int) -> None:
    """1 x 128 (blockwise) and 1 x 32 (mxfp8) along either dimension, with a short last block."""
    x = spread(*shape)
    lines = x if dim == 1 else x.t()
    for size, found in ((128, quantise_rows(x, form, dim)), (32, quantise_mx(x, form, dim))):
        expected = torch.zeros_like(lines)
        for i, line in enumerate(lines):
            for first in range(0, len(line), size):
                block = line[first : first + size]
                amax = float(block.abs().max())
                if size == 128:
                    scale = expected_scale(amax, form, power_of_2=True)
                else:
                    scale = 2.0 ** (127 - expected_mx_exponent(amax, form)) if amax else 1.0
                expected[i, first : first + size] = cast(block, scale, form)
        assert torch.equal(found, expected if dim == 1 else expected.t())
    fp32_scales = quantise_rows(x, form, dim, power_of_2=False)
    assert not torch.equal(fp32_scales, quantise_rows(x, form, dim))


@FORMATS
@pytest.mark.parametrize("shape", [(256, 128), (200, 300), (5, 7)])
def test_squares_block_by_block(form: Format, shape: tuple[int, int]) -> None:
    x = spread(*shape)
    expected = torch.zeros_like(x)
    for i in range(0, shape[0], 128):
        for j in range(0, shape[1], 128):
            block = x[i : i + 128, j : j + 128]
            expected[i : i + 128, j : j + 128] = cast(
                block, expected_scale(float(block.abs().max()), form, power_of_2=True), form
            )
    assert torch.equal(quantise_squares(x, form), expected)
    assert torch.equal(quantise_squares(x.t().contiguous(), form), expected.t())  # one operand serves both products


@FORMATS
def test_current_scale_is_the_tensors_own(form: Format) -> None:
    x = spread(7, 40)
    assert torch.equal(quantise_current(x, form), cast(x, expected_scale(float(x.abs().max()), form, False), form))
    assert torch.equal(quantise_current(torch.zeros(3, 4), form), torch.zeros(3, 4))


def test_nan_is_not_lost() -> None:
    """A guard must see it in the loss; it may spread over its block."""
    x = torch.ones(2, 256)
    x[1, 200] = torch.nan
    for y in (quantise_current(x, E4M3), quantise_rows(x, E4M3, 1), quantise_mx(x, E4M3, 1), quantise_squares(x, E4M3)):
        assert y[1, 200].isnan()
    assert not quantise_rows(x, E4M3, 1)[0].isnan().any()


numbers = st.lists(
    st.one_of(st.just(0.0), st.floats(2.0**-60, 2.0**60, width=32), st.floats(-(2.0**60), -(2.0**-60), width=32)),
    min_size=1,
    max_size=80,
)


@settings(deadline=None)
@given(numbers)
def test_error_is_within_the_formats_theory(values: list[float]) -> None:
    """A normal number moves by at most the unit roundoff u, relatively; a subnormal by half the spacing, which is
    smallest / 2 / scale. What is scaled by largest / amax has scale >= largest / (2 amax) after rounding to a power of
    two, down (blockwise) or up of the inverse (mxfp8), so half the spacing is at most smallest amax / largest. The
    three fp32 roundings of scale, product and inverse add 2^-22."""
    x = torch.tensor([values], dtype=torch.float32)
    for form in (E4M3, E5M2):
        for size, found in (
            (len(values), quantise_current(x, form)),
            (128, quantise_rows(x, form, 1)),
            (128, quantise_squares(x, form)),
            (32, quantise_mx(x, form, 1)),
        ):
            for first in range(0, len(values), size):
                block, read = (t[0, first : first + size].double() for t in (x, found))
                floor = form.smallest * block.abs().max() / form.largest
                limit = torch.maximum(form.unit_roundoff * block.abs(), floor) + 2.0**-22 * block.abs()
                assert bool(((read - block).abs() <= limit).all())


class TestDelayed:
    """Transformer Engine's DelayedScaling: scales come from earlier passes."""

    @staticmethod
    def scales(amaxes: list[float], margin: int = 0, length: int = 1, algorithm: str = "most_recent") -> list[float]:
        delayed = DelayedScale(E4M3, margin, length, algorithm, torch.device("cpu"))
        found = []
        for amax in amaxes:
            found.append(float(delayed.scale))
            delayed.observe(torch.tensor([0.1 * amax, -amax]), None)
        return [*found, float(delayed.scale)]

    def test_one_pass_late(self) -> None:
        assert self.scales([2.0, 7.0, 3.5]) == [1.0, 224.0, 64.0, 128.0]

    def test_margin(self) -> None:
        assert self.scales([2.0, 7.0], margin=2) == [1.0, 56.0, 16.0]

    def test_history(self) -> None:
        """The largest of the latest three, the pass itself included; the most recent whatever the history."""
        amaxes = [7.0, 3.5, 1.75, 0.875, 0.875]
        assert self.scales(amaxes, length=3, algorithm="max") == [1.0, 64.0, 64.0, 64.0, 128.0, 256.0]
        assert self.scales(amaxes, length=3) == [1.0, 64.0, 128.0, 256.0, 512.0, 512.0]

    def test_nothing_to_go_by_keeps_the_scale(self) -> None:
        assert self.scales([7.0, 0.0, torch.inf, torch.nan, 3.5]) == [1.0, 64.0, 64.0, 64.0, 64.0, 128.0]
        assert self.scales([1e-44])[-1] == torch.finfo(torch.float32).max

    def test_state_round_trip(self) -> None:
        first = DelayedScale(E5M2, 1, 4, "max", torch.device("cpu"))
        for amax in (3.0, 9.0, 1.0):
            first.observe(torch.tensor([amax]), None)
        second = DelayedScale(E5M2, 1, 4, "max", torch.device("cpu"))
        second.restore(first.state())
        for delayed in (first, second):
            delayed.observe(torch.tensor([2.0]), None)
        assert torch.equal(first.history, second.history)
        assert torch.equal(first.scale, second.scale)
        other = DelayedScale(E5M2, 1, 2, "max", torch.device("cpu"))
        other.restore(first.state())
        assert other.history.tolist() == [2.0, 1.0]


def test_fp32_bits() -> None:
    """The reference's fp32 quotient is the one that torch takes (both round once)."""
    quotient = float(torch.tensor(448.0) / torch.tensor(0.3))
    assert struct.pack("f", quotient) == struct.pack("f", np.float32(448.0) / np.float32(0.3))
