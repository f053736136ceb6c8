"""Massive dimensions: found by their definition, in any batches, and taken out of the comparison."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prism_nemo.analysis.gram import cka, gram_of
from prism_nemo.analysis.massive import RAW, STANDARDISED, WITHOUT, DimensionSizes, treat


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sizes_of(*batches: Tensor) -> DimensionSizes:
    sizes = DimensionSizes()
    for batch in batches:
        sizes.update(batch)
    return sizes


def test_a_dimension_is_massive_against_the_median_of_its_own_token() -> None:
    states = torch.ones(3, 5)
    states[0] *= 100  # a token that is large as a whole has no massive dimension
    states[1, 3] = -40
    found = sizes_of(states).largest(30)
    assert [row["dimension"] for row in found if row["massive"]] == [3]
    assert found[0] == {
        "dimension": 3,
        "ratio": 40.0,
        "magnitude": 100.0,
        "rms": pytest.approx(((100**2 + 40**2 + 1) / 3) ** 0.5),
        "massive": True,
    }
    assert sizes_of(states).massive(30) == [3]
    assert sizes_of(states).massive(41) == []
    assert len(found) == 5  # the next largest are listed too


def test_batches_do_not_matter() -> None:
    states = normal(40, 7, seed=0)
    assert sizes_of(*states.split([1, 30, 9])).largest(5) == [
        {key: pytest.approx(value, rel=1e-12) for key, value in row.items()} for row in sizes_of(states).largest(5)
    ]


def test_every_massive_dimension_is_listed() -> None:
    states = torch.ones(2, 20)
    states[0, 4:12] = 50
    assert [row["dimension"] for row in sizes_of(states).largest(10)] == list(range(4, 12))


def test_treatments() -> None:
    x, y = normal(9, 6, seed=1), normal(9, 6, seed=2)
    y[:, 5] = 0.1  # constant
    both = treat(x, y, WITHOUT, ([1], [4]))
    kept = [0, 2, 3, 5]  # without those of either model
    assert torch.equal(both.first, x[:, kept])
    assert torch.equal(both.second, y[:, kept])
    own = treat(x, y[:, :5], WITHOUT, ([1], [4]))  # of another width: each model's own
    assert own.first.shape[1] == 5
    assert own.second.shape[1] == 4
    scaled = treat(x, y, STANDARDISED, ([], []))
    for z in (scaled.first, scaled.second[:, :5]):
        assert torch.allclose(z.mean(dim=0), torch.zeros(z.shape[1], dtype=torch.float64), atol=1e-12)
        assert torch.allclose(z.square().mean(dim=0), torch.ones(z.shape[1], dtype=torch.float64))
    assert torch.equal(scaled.second[:, 5], torch.zeros(9, dtype=torch.float64))
    raw = treat(x, y, RAW, ([1], [4]))
    assert torch.equal(raw.first, x)
    assert torch.equal(raw.second, y)


def test_a_shared_massive_dimension_blinds_raw_cka() -> None:
    """Two unrelated representations with one large dimension in common: alike when raw, unrelated when treated."""
    shared = 300 * normal(200, 1, seed=3)
    x = torch.cat((normal(200, 30, seed=4), shared), dim=1)
    y = torch.cat((normal(200, 30, seed=5), shared), dim=1)
    massive = sizes_of(x).massive(100)
    assert massive == [30]

    def value(treatment: str) -> float:
        both = treat(x, y, treatment, (massive, sizes_of(y).massive(100)))
        return cka(gram_of(both.first), gram_of(both.second), "debiased")

    assert value(RAW) > 0.999
    # Debiased CKA of independent Gaussian rows has a standard deviation near 1 / n = 0.005.
    assert abs(value(WITHOUT)) < 0.03
    assert value(STANDARDISED) < 0.1
