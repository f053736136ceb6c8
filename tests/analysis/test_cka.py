"""Linear CKA against its definition, its invariances and a slow direct form of the unbiased estimator."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prism_nemo.analysis.cka import LinearCKA, cka_by_layer, debiased_linear_cka, linear_cka

quick = settings(max_examples=40, deadline=None)
# (n, p, q): both sides of the switch between the feature-space and the Gram form
shapes = st.tuples(st.integers(4, 30), st.integers(2, 12), st.integers(2, 40))


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def related(n: int, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two representations that share a part, with means far from zero."""
    x = normal(n, p, seed=seed) + 3 * normal(1, p, seed=seed + 1)
    y = x @ normal(p, q, seed=seed + 2) + normal(n, q, seed=seed + 3) - 5
    return x, y


def centred_gram(x: Tensor) -> Tensor:
    n = x.shape[0]
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    return h @ (x @ x.T) @ h


def slow_unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012 term by term, on Gram matrices of the data as they are."""
    n = x.shape[0]
    k, m = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    one = torch.ones(n, dtype=torch.float64)
    value = (
        (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return float(value / (n * (n - 3)))


def test_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])  # centred -1, 0, 1
    y = torch.tensor([[1.0], [0.0], [2.0]])  # centred 0, -1, 1: covariance 1, variances 2 and 2
    assert linear_cka(x, y) == pytest.approx(1 / 4)
    wide = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, 0.0, 5.0]])
    # Centred Gram matrices: x [[1,0,-1],[0,0,0],[-1,0,1]], wide [[5,-4,-1],[-4,5,-1],[-1,-1,2]]/9.
    # Their product is 9/9, their norms are 2 and sqrt(90)/9.
    assert linear_cka(x, wide) == pytest.approx(1 / (2 * math.sqrt(90) / 9))


@quick
@given(shapes, st.integers(0, 10_000))
def test_both_forms_equal_the_centred_gram_definition(shape: tuple[int, int, int], seed: int) -> None:
    x, y = related(*shape, seed=seed)
    k, m = centred_gram(x), centred_gram(y)
    expected = float((k * m).sum() / (k.norm() * m.norm()))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(y, x) == pytest.approx(expected, rel=1e-9)
    assert 0 <= linear_cka(x, y) <= 1 + 1e-12


@pytest.mark.parametrize(("n", "p", "flops"), [(50, 4, 3 * 2 * 50 * 4 * 4), (4, 50, 3 * 2 * 2 * 4 * 4 * 50)])
def test_the_cheaper_form_is_used(n: int, p: int, flops: int) -> None:
    with FlopCounterMode(display=False) as counter:
        linear_cka(normal(n, p, seed=0), normal(n, p, seed=1))
    assert counter.get_total_flops() == flops  # the other form takes 120,000 and 60,000


@pytest.mark.parametrize("measure", [linear_cka, debiased_linear_cka])
@pytest.mark.parametrize("n", [6, 50])
def test_invariances(measure, n: int) -> None:
    x, y = related(n, 8, 8, seed=1)
    rotation = torch.linalg.qr(normal(8, 8, seed=2)).Q
    value = measure(x, y)
    assert value < 0.99
    assert measure(x, x) == pytest.approx(1)
    assert measure(x, -2.5 * x @ rotation + 7) == pytest.approx(1)
    assert measure(x @ rotation, 1e-3 * y - 4) == pytest.approx(value)
    stretch = torch.diag(torch.tensor([30.0] + [1.0] * 7, dtype=torch.float64))
    assert measure(x, x @ stretch) < 0.9  # an arbitrary linear map counts as a change
    assert measure(x[torch.randperm(n, generator=torch.Generator().manual_seed(0))], y) != pytest.approx(
        value, abs=0.01
    )


@quick
@given(shapes, st.integers(0, 10_000))
def test_debiased_equals_the_slow_estimator(shape: tuple[int, int, int], seed: int) -> None:
    x, y = related(*shape, seed=seed)
    expected = slow_unbiased_hsic(x, y) / math.sqrt(slow_unbiased_hsic(x, x) * slow_unbiased_hsic(y, y))
    assert debiased_linear_cka(x, y) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_unrelated_wide_data_fool_only_the_plain_form() -> None:
    pairs = [(normal(20, 2000, seed=i), normal(20, 2000, seed=100 + i)) for i in range(20)]
    assert min(linear_cka(x, y) for x, y in pairs) > 0.9
    debiased = [debiased_linear_cka(x, y) for x, y in pairs]
    assert abs(sum(debiased) / 20) < 0.06
    assert max(map(abs, debiased)) < 0.3


@quick
@given(shapes, st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 10_000))
def test_streaming_equals_full(shape: tuple[int, int, int], sizes: list[int], seed: int) -> None:
    x, y = related(*shape, seed=seed)
    stream, start = LinearCKA(), 0
    for size in [*sizes, shape[0]]:  # uneven batches, single rows among them
        if start < shape[0]:
            stream.update(x[start : start + size], y[start : start + size])
        start += size
    assert stream.rows == shape[0]
    assert stream.compute() == pytest.approx(linear_cka(x, y), rel=1e-9)


def test_streaming_and_full_survive_massive_activations() -> None:
    x, y = related(64, 6, 5, seed=3)
    shifted = [z + torch.tensor([1e7] + [0.0] * (z.shape[1] - 1)) for z in (x, y)]
    stream = LinearCKA()
    for i in range(0, 64, 10):
        stream.update(shifted[0][i : i + 10], shifted[1][i : i + 10])
    assert linear_cka(*shifted) == pytest.approx(linear_cka(x, y), rel=1e-6)
    assert stream.compute() == pytest.approx(linear_cka(x, y), rel=1e-6)  # plain sums are off by 1e-2 here


def test_half_precision_is_computed_in_float64() -> None:
    x, y = related(40, 6, 6, seed=4)
    x, y = x.bfloat16(), y.bfloat16()
    exact = linear_cka(x.double(), y.double())
    assert linear_cka(x, y) == exact
    stream = LinearCKA()
    stream.update(x, y)
    assert stream.compute() == pytest.approx(exact, rel=1e-12)
    assert linear_cka(x.requires_grad_(), y) == exact
    stream.update(x, y)
    assert not any(product.requires_grad for product in stream._products)  # or every minibatch would stay in memory


def stream_cka(x: Tensor, y: Tensor) -> float:
    stream = LinearCKA()
    stream.update(x, y)
    return stream.compute()


@pytest.mark.parametrize("measure", [linear_cka, debiased_linear_cka, stream_cka])
def test_refusals(measure) -> None:
    good = normal(6, 3, seed=0)
    bad = good.clone()
    bad[2, 1] = math.nan
    constant = torch.full((6, 3), 0.1, dtype=torch.float64)  # the mean of six 0.1 is not 0.1 in float64
    for x, y, match in (
        (good, good[:5], "6 rows, y has 5"),
        (good[:1], good[:1], "too few"),
        (good[0], good, "x: expected"),
        (good, good[:, :0], "y: expected"),
        (bad, good, "x: holds NaN"),
        (good, bad / 0, "y: holds NaN"),
        (constant, good, "x: every feature is constant"),
        (good, constant, "y: every feature is constant"),
    ):
        with pytest.raises(ValueError, match=match):
            measure(x, y)


def test_limits_of_the_debiased_form() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        debiased_linear_cka(normal(3, 2, seed=0), normal(3, 2, seed=1))
    assert math.isfinite(debiased_linear_cka(normal(4, 2, seed=0), normal(4, 2, seed=1)))
    with pytest.raises(ValueError, match="y: its rows are all equally far apart"):
        debiased_linear_cka(normal(5, 2, seed=0), torch.eye(5))
    for n in range(4, 30):  # rounding leaves a positive or a negative remainder
        with pytest.raises(ValueError, match="equally far apart"):
            debiased_linear_cka(0.3 * torch.eye(n) + 0.7, normal(n, 2, seed=n))


def test_underflow_is_refused() -> None:
    with pytest.raises(ValueError, match="too little"):
        linear_cka(1e-170 * normal(5, 2, seed=0), normal(5, 2, seed=0))


def test_streaming_refusals() -> None:
    stream = LinearCKA()
    with pytest.raises(ValueError, match="0 rows"):
        stream.compute()
    stream.update(normal(1, 3, seed=0), normal(1, 2, seed=1))
    with pytest.raises(ValueError, match="1 rows"):
        stream.compute()
    with pytest.raises(ValueError, match="y: 3 features, but 2"):
        stream.update(normal(4, 3, seed=0), normal(4, 3, seed=1))
    with pytest.raises(ValueError, match="too few"):
        stream.update(normal(0, 3, seed=0), normal(0, 2, seed=1))
    constant = LinearCKA()
    for _ in range(2):  # constant over both minibatches
        constant.update(normal(3, 2, seed=0), torch.full((3, 2), 0.1))
    with pytest.raises(ValueError, match="y: every feature"):
        constant.compute()
    varies = LinearCKA()
    for value in (0.1, 0.2, 0.1):  # constant within each, not over all, and back at the first row
        varies.update(normal(3, 2, seed=int(10 * value)), torch.full((3, 2), value))
    assert 0 <= varies.compute() <= 1


def test_by_layer() -> None:
    pairs = [related(10, 4, 6, seed=seed) for seed in (1, 2, 3)]
    first, second = [x for x, _ in pairs], [y for _, y in pairs]
    assert cka_by_layer(first, second) == [linear_cka(x, y) for x, y in pairs]
    assert cka_by_layer(first, second, debiased=True) == [debiased_linear_cka(x, y) for x, y in pairs]
    for a, b in ((first, second[:2]), ([], [])):
        with pytest.raises(ValueError, match="layers"):
            cka_by_layer(a, b)
    second[1] = second[1][:9]
    with pytest.raises(ValueError, match="layer 1: x has 10 rows"):
        cka_by_layer(first, second)
