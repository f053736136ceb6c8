"""CKA from Gram matrices: against the definitions, against a plain recomputation of every draw, and its intervals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prism_nemo.analysis.cka import debiased_linear_cka, linear_cka, plain_linear_cka
from prism_nemo.analysis.gram import (
    MEASURES,
    cka,
    cross_cka,
    drawn_cka,
    gram_of,
    half_sample_interval,
    half_samples,
)

DIRECT = {"plain": plain_linear_cka, "centred": linear_cka, "debiased": debiased_linear_cka}


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def related(n: int, p: int, q: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two representations that share a part, with means far from zero."""
    x = normal(n, p, seed=seed) + 3 * normal(1, p, seed=seed + 1)
    return x, x @ normal(p, q, seed=seed + 2) + normal(n, q, seed=seed + 3) - 5


@pytest.mark.parametrize(("n", "p", "q"), [(30, 6, 9), (12, 50, 40)])
@pytest.mark.parametrize("measure", MEASURES)
def test_equal_to_the_direct_forms(n: int, p: int, q: int, measure: str) -> None:
    x, y = related(n, p, q)
    assert cka(gram_of(x), gram_of(y), measure) == pytest.approx(DIRECT[measure](x, y), abs=1e-10)


def test_plain_form_is_the_printed_formula() -> None:
    x, y = related(25, 7, 5)
    printed = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert plain_linear_cka(x, y) == pytest.approx(float(printed), abs=1e-12)
    assert cka(gram_of(x), gram_of(y), "plain") == pytest.approx(float(printed), abs=1e-12)
    # Not centred: a mean that both share makes unrelated data alike.
    far = torch.full((1, 7), 50.0, dtype=torch.float64)
    assert plain_linear_cka(normal(25, 7, seed=1) + far, normal(25, 7, seed=2) + far) > 0.99
    assert linear_cka(normal(25, 7, seed=1) + far, normal(25, 7, seed=2) + far) < 0.5


@pytest.mark.parametrize("measure", MEASURES)
def test_invariances(measure: str) -> None:
    x, y = related(40, 8, 8)
    rotation = torch.linalg.qr(normal(8, 8, seed=9)).Q
    value = cka(gram_of(x), gram_of(y), measure)
    assert cka(gram_of(x @ rotation), gram_of(-0.01 * y), measure) == pytest.approx(value, abs=1e-10)
    assert cka(gram_of(x), gram_of(3 * x @ rotation), measure) == pytest.approx(1.0, abs=1e-12)
    shifted = cka(gram_of(x + 100), gram_of(y), measure)
    assert (shifted == pytest.approx(value, abs=1e-8)) == (measure != "plain")


@pytest.mark.parametrize("measure", MEASURES)
def test_cross_map_holds_every_pair(measure: str) -> None:
    first, second = [normal(15, 4, seed=i) for i in range(3)], [normal(15, 6, seed=10 + i) for i in range(2)]
    found = cross_cka([gram_of(x) for x in first], [gram_of(y) for y in second], measure)
    assert found.shape == (3, 2)
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            assert float(found[i, j]) == pytest.approx(DIRECT[measure](x, y), abs=1e-10)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_draw_is_the_measure_of_the_drawn_rows(measure: str) -> None:
    x, y = related(24, 5, 30)
    groups = torch.arange(12).repeat_interleave(2)  # two tokens of each text
    w = half_samples(groups, draws=7, seed=3)
    found = drawn_cka(gram_of(x), gram_of(y), w, measure)
    for draw in range(7):
        rows = w[:, draw].bool()
        assert float(found[draw]) == pytest.approx(DIRECT[measure](x[rows], y[rows]), abs=1e-9)


def test_half_samples_take_whole_texts_and_half_of_them() -> None:
    groups = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4])  # texts of different length, an odd number of them
    w = half_samples(groups, draws=200, seed=0)
    for draw in range(200):
        drawn = {int(t) for t in groups[w[:, draw].bool()]}
        assert len(drawn) == 2
        assert all((w[groups == t, draw] == (t in drawn)).all() for t in range(5))
    often = torch.stack([w[groups == t][0] for t in range(5)]).mean(dim=1)
    # Each text in 2 of 5 draws; 4 standard errors of 200 draws.
    assert (often - 0.4).abs().max() < 4 * math.sqrt(0.4 * 0.6 / 200)
    assert torch.equal(w, half_samples(groups, draws=200, seed=0))
    assert not torch.equal(w, half_samples(groups, draws=200, seed=1))


def interval(x: Tensor, y: Tensor, measure: str, draws: int = 200) -> tuple[float, float, float]:
    a, b = gram_of(x), gram_of(y)
    estimate = cka(a, b, measure)
    found = drawn_cka(a, b, half_samples(torch.arange(len(x)), draws, 0), measure)
    ends = half_sample_interval(estimate, found, len(x))
    assert ends is not None
    return estimate, *ends


def test_only_the_debiased_form_sees_that_noise_is_unrelated() -> None:
    """64 rows of 256 features: the others are biased far upwards, and their intervals lie around the biased value."""
    inside = 0
    for seed in range(40):
        x, y = normal(64, 256, seed=seed), normal(64, 256, seed=1000 + seed)
        estimate, low, high = interval(x, y, "debiased")
        inside += low <= 0 <= high
        assert low <= estimate <= high
        for measure in ("plain", "centred"):
            value, low, high = interval(x, y, measure, draws=40)
            assert low > 0.5
            assert value > 0.5
    # Too wide by sqrt(3) for unrelated data: of 40 that hold 0 with probability 0.999, fewer than 38 do in 1 of 10^5.
    assert inside >= 38


def test_interval_is_as_wide_as_the_spread_of_new_texts() -> None:
    """Standard deviation of the estimate over 60 fresh sets of texts, against the one that intervals imply."""
    estimates, implied = [], []
    mix = normal(10, 10, seed=5)
    for seed in range(60):
        x = normal(61, 10, seed=seed)  # an odd number: the half is 30, and the spread is scaled
        y = x @ mix + 3 * normal(61, 10, seed=500 + seed)
        estimate, low, high = interval(x, y, "centred")
        estimates.append(estimate)
        implied.append((high - low) / (2 * 1.96))
    ratio = sum(implied) / len(implied) / float(torch.tensor(estimates).std())
    # 60 values give a standard deviation to 9 % (1 / sqrt(2 * 59)), and the half samples of 61 texts are not normal.
    assert 0.7 < ratio < 1.4


def test_interval_without_enough_values() -> None:
    assert half_sample_interval(0.5, torch.tensor([math.nan, math.nan, 0.5]), 10) is None
    low, high = half_sample_interval(0.999, torch.linspace(0.9, 1.1, 101, dtype=torch.float64), 10) or (0, 0)
    assert low == pytest.approx(0.999 - 0.095)
    assert high == 1.0  # cut


def test_refusals() -> None:
    good = normal(6, 3, seed=0)
    bad = good.clone()
    bad[1, 1] = math.inf
    for x, match in (
        (good[:3], "at least 4 rows"),
        (good[:, :0], "with features"),
        (bad, "NaN or Inf"),
        (good[:1].expand(6, 3), "constant"),
    ):
        with pytest.raises(ValueError, match=match):
            gram_of(x)
    with pytest.raises(ValueError, match="equally far apart"):
        cka(gram_of(torch.eye(5)), gram_of(normal(5, 2, seed=0)), "debiased")
    with pytest.raises(ValueError, match="scale them up"):
        plain_linear_cka(torch.zeros(4, 2), good[:4])
