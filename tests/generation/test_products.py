"""Weights laid out for the machine give the product of the weights as they are, row by row."""

from __future__ import annotations

import pytest
import torch

from prism_nemo.generation.products import Product

# Unit roundoff of a type: half the distance from 1 to the next number.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 16, 8), (7, 24, 149), (130, 256, 40)])
@pytest.mark.parametrize("scale", [1.0, 0.22])
def test_products_equal_those_in_fp64(dtype: torch.dtype, rows: int, inner: int, out: int, scale: float) -> None:
    """Within the bound of Higham (Accuracy and Stability, 3.1) for sums of `inner` products accumulated in fp32.

    That is (inner + 4) fp32 roundings of the sum of magnitudes (four: of the scale, its product, the sum with the
    stream), and up to three roundings of results to the type: of the product, of its scaled value and of the sum.
    """
    torch.manual_seed(rows)
    weight, x, stream = (torch.randn(n, m).to(dtype) for n, m in ((out, inner), (rows, inner), (rows, out)))
    product = Product(weight)
    wide, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    sums = (inner + 4) * ROUNDOFF[torch.float32] * magnitude
    assert ((product(x) - wide).abs() <= sums + ROUNDOFF[dtype] * wide.abs()).all()
    total = stream.double() + scale * wide
    bound = scale * sums + ROUNDOFF[dtype] * (2 * scale * wide.abs() + total.abs()) * 1.01
    bound += ROUNDOFF[torch.float32] * stream.abs()
    assert ((product.added(x, stream, scale) - total).abs() <= bound).all()
    shaped = product.added(x.view(rows, 1, inner), stream.view(rows, 1, out), scale)
    assert torch.equal(shaped, product.added(x, stream, scale).view(rows, 1, out))


def test_a_type_without_a_kernel_is_multiplied_as_it_is() -> None:
    weight, x, stream = (torch.randn(n, 6, dtype=torch.float64) for n in (6, 5, 5))
    product = Product(weight)
    torch.testing.assert_close(product(x), x @ weight.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product.added(x, stream, 0.5), stream + x @ weight.T / 2, rtol=1e-12, atol=1e-12)
    assert not product.added(x, stream, 1.0).is_set_to(stream)


def test_the_stream_is_not_changed() -> None:
    """Before a prompt's last layer is read it may be looked at by `Decoder.observe`."""
    product, x, stream = Product(torch.randn(8, 8)), torch.randn(3, 8), torch.randn(3, 8)
    before = stream.clone()
    product.added(x, stream, 1.0)
    product.added(x, stream, 2.0)
    assert torch.equal(stream, before)
