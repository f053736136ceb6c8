"""Rounding to E4M3 and E5M2 against torch's own casts, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_nemo.precision.formats import E4M3, E5M2, Format, round_to

FORMATS = pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda f: f.name)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal including the sign of zero; NaN equals NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0).view(torch.int32), b.nan_to_num(0.0).view(torch.int32)
    )


def finite_values(form: Format) -> torch.Tensor:
    """Every finite number of the format, ascending, -0 left out."""
    values = torch.arange(256, dtype=torch.uint8).view(form.dtype).float()
    return values[values.isfinite()].unique()


@FORMATS
def test_every_bf16_number_rounds_as_torchs_cast_does(form: Format) -> None:
    """All 65,536 patterns: zeros of both signs, subnormals of both formats, normals, NaNs. Above the largest number
    Transformer Engine saturates; torch's E5M2 overflows."""
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).float()
    rounded = round_to(x, form)
    inside = (x.abs() <= form.largest) | x.isnan()
    assert inside.sum() > 30_000
    assert same_bits(rounded[inside], x[inside].to(form.dtype).float())
    above = ~inside
    assert torch.equal(rounded[above], form.largest * x[above].sign())
    if form is E5M2:
        assert x[above].to(form.dtype).float().isinf().any()  # so the cast alone would not do


@FORMATS
def test_every_midpoint_and_its_neighbours(form: Format) -> None:
    """Ties go to even, and the fp32 numbers next to a tie to their own side: double rounding would show here."""
    values = finite_values(form)
    middle = ((values[1:].double() + values[:-1].double()) / 2).float()
    for x in (middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf)), values):
        assert same_bits(round_to(x, form), x.to(form.dtype).float())
    assert torch.equal(round_to(values, form), values)


@FORMATS
def test_special_values(form: Format) -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e38, form.smallest / 2, form.smallest * 0.5000001])
    expected = torch.tensor([0.0, -0.0, form.largest, -form.largest, torch.nan, form.largest, 0.0, form.smallest])
    before = x.clone()
    assert same_bits(round_to(x, form), expected)
    assert same_bits(x, before)  # the argument is not changed


@FORMATS
def test_constants_are_those_of_torchs_type(form: Format) -> None:
    info = torch.finfo(form.dtype)
    assert (form.largest, 2.0**form.min_exponent, form.smallest) == (
        info.max,
        info.tiny,
        finite_values(form).abs().unique()[1].item(),
    )
    assert 2 * form.unit_roundoff == info.eps


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
def test_any_fp32_number(numbers: list[float]) -> None:
    """As torch's cast, and no farther away than the format's theory says."""
    x = torch.tensor(numbers, dtype=torch.float32)
    for form in (E4M3, E5M2):
        rounded = round_to(x, form)
        inside = x.clamp(-form.largest, form.largest)
        assert same_bits(rounded, inside.to(form.dtype).float())
        limit = torch.maximum(inside.abs().double() * form.unit_roundoff, torch.tensor(form.smallest / 2).double())
        assert bool(((rounded.double() - inside.double()).abs() <= limit).all())
