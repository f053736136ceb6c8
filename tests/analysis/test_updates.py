"""Counts in one pass against plain torch, and what is said of two updates."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_nemo.analysis.passes import THRESHOLDS_PERCENT, levels, limits, same_in_bf16
from prism_nemo.analysis.weights import compare_checkpoints, compare_weights

A, B = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
SIZES = {A: (40, 30), B: (50, 20)}


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def draw(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(size, generator=generator) for name, size in SIZES.items()}


def moved(weights: dict[str, Tensor], by: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + by[name] for name, tensor in weights.items()}


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].double().reshape(-1) for name in sorted(weights)])


def test_levels_of_bf16_are_exact_at_every_tie() -> None:
    """Every mantissa, changes of up to 70 spacings either way, in fractions: 200 to 201 is 0.5 % and not above it."""
    mantissas = torch.arange(128, 256, dtype=torch.float32)
    steps = torch.arange(-70, 71, dtype=torch.float32)
    a = mantissas.repeat_interleave(len(steps))
    b = (a + steps.repeat(len(mantissas))).bfloat16().float()
    assert torch.equal(a.bfloat16().float(), a)
    found = np.empty(len(a), np.uint8)
    levels(a.numpy(), b.numpy(), limits(np.float32), found)
    factors = [Fraction(str(percent)) / 100 for percent in THRESHOLDS_PERCENT]
    ties = 0
    for x, y, level in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        ratio = abs(Fraction(y) - Fraction(x)) / Fraction(x)
        assert level == (ratio > 0) + sum(ratio > factor for factor in factors)
        ties += ratio in factors
    assert ties > 40


def test_bf16_rounding_is_torchs() -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).int()
    a = bits.view(torch.float32)
    a = a[a.isfinite()]
    b = a + a.abs() * torch.tensor([0.0, 1e-3, -2e-3, 4e-3]).repeat(len(a))[: len(a)]
    kept = b.isfinite() & a.bfloat16().isfinite() & b.bfloat16().isfinite()
    a, b = a[kept], b[kept]
    pair = [x.contiguous().view(torch.int32).numpy().view(np.uint32) for x in (a, b)]
    assert same_in_bf16(*pair) == int((a.bfloat16() == b.bfloat16()).sum())
    zeros = torch.tensor([0.0, -0.0]), torch.tensor([-0.0, 0.0])
    assert same_in_bf16(*(x.view(torch.int32).numpy().view(np.uint32) for x in zeros)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_signs_and_tenths(tmp_path: Path, dtype: torch.dtype) -> None:
    before = {name: tensor.to(dtype) for name, tensor in draw(0).items()}
    after = {name: tensor.to(dtype) for name, tensor in moved(draw(0), draw(1, 0.02)).items()}
    change = compare_weights(save(tmp_path / "a", before), save(tmp_path / "b", after)).total
    a, b = flat(before), flat(after)
    assert change.update_norm == pytest.approx(float((b - a).norm()), rel=1e-12)
    assert change.weight_norm == pytest.approx(float(a.norm()), rel=1e-12)
    assert change.drift == pytest.approx(float(a @ (b - a) / (a @ a)), rel=1e-9)
    assert change.sign_flip_fraction == float(((a * b) < 0).double().mean()) > 0
    by_size = a.abs().sort().indices.chunk(10)
    shares = [float(((b - a).abs() > 0.01 * a.abs())[part].double().mean()) for part in by_size]
    # One magnitude in bf16 may lie in two tenths: of 220 weights, those of a magnitude are few.
    assert change.deciles == pytest.approx(shares, abs=0.03)
    assert change.deciles[0] > change.deciles[-1]


def test_zero_has_no_sign(tmp_path: Path) -> None:
    before = {A: torch.tensor([[1.0, -1.0, 0.0, 0.0, 2.0, -2.0]])}
    after = {A: torch.tensor([[0.0, 0.0, 1.0, -1.0, -1e-30, 3.0]])}
    change = compare_weights(save(tmp_path / "a", before), save(tmp_path / "b", after)).total
    assert change.sign_flip_fraction == pytest.approx(2 / 6)


def test_weights_that_only_shrank_have_that_drift(tmp_path: Path) -> None:
    before = draw(0)
    after = {name: 0.9 * tensor for name, tensor in before.items()}
    change = compare_weights(save(tmp_path / "a", before), save(tmp_path / "b", after)).total
    assert change.drift == pytest.approx(-0.1, rel=1e-6)
    assert change.relative_l2 == pytest.approx(0.1, rel=1e-6)
    assert change.sign_flip_fraction == 0


def sets(a: Tensor, b: Tensor, c: Tensor, d: Tensor, percent: float) -> tuple[float, float]:
    """Overlap of the sets that two updates changed by more, and that of sets of these sizes by chance."""
    one, two = (b - a).abs() > percent / 100 * a.abs(), (d - c).abs() > percent / 100 * c.abs()
    chance = float(one.sum()) * float(two.sum()) / len(a)
    return float((one & two).sum()) / float((one | two).sum()), chance / (float(one.sum()) + float(two.sum()) - chance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_updates_in_size_direction_and_place(tmp_path: Path, dtype: torch.dtype) -> None:
    """From one start and from two, against plain torch; parts add up to the whole."""
    shared, own = draw(2, 0.01), (draw(3, 0.01), draw(4, 0.01))
    base = draw(0)
    models = [base, *(moved(moved(base, shared), part) for part in own), moved(base, draw(5, 0.1))]
    stored = [{name: tensor.to(dtype) for name, tensor in model.items()} for model in models]
    folders = [save(tmp_path / str(i), model) for i, model in enumerate(stored)]
    moves = [(0, 1), (0, 2), (3, 2)]
    changes, overlaps = compare_checkpoints(folders, moves)
    assert set(overlaps) == {(0, 1), (0, 2), (1, 2)}
    values = [flat(model) for model in stored]
    for (one, two), found in overlaps.items():
        a, b, c, d = (values[i] for i in (*moves[one], *moves[two]))
        total = found.total
        assert total.cosine == pytest.approx(float((b - a) @ (d - c) / (b - a).norm() / (d - c).norm()), rel=1e-9)
        for key, percent in (("0", 0.0), ("1", 1.0), ("10", 10.0)):
            jaccard, chance = sets(a, b, c, d, percent)
            assert total.jaccard[key] == pytest.approx(jaccard, rel=1e-12)
            assert total.by_chance[key] == pytest.approx(chance, rel=1e-12)
        both = (b != a) & (d != c)
        assert total.same_sign == pytest.approx(
            float((((b > a) == (d > c)) & both).sum()) / float(both.sum()), rel=1e-12
        )
        assert set(found.by_layer) == {"0", "1"}
        assert found.by_subcomponent["attention.q"] == found.by_layer["0"]
    assert overlaps[0, 1].total.cosine == pytest.approx(0.5, abs=0.1)  # half of each update's variance is shared
    if dtype == torch.float32:  # where nearly every weight moves: 1/2 + asin(0.5) / pi
        assert overlaps[0, 1].total.same_sign == pytest.approx(2 / 3, abs=0.05)
    # Larger changes agree more often.
    assert (overlaps[0, 1].total.same_sign_1pct or 0) > 2 / 3
    alone = compare_weights(folders[3], folders[2])
    assert alone.total == changes[2].total


def test_independent_updates_overlap_because_weights_are_small(tmp_path: Path) -> None:
    """Far more than sets of these sizes would by chance, and as much as weights of these sizes do."""
    generator = torch.Generator().manual_seed(0)
    base = {A: torch.randn(700, 700, generator=generator)}
    after = [{A: base[A] + 3e-4 * torch.randn(700, 700, generator=generator)} for _ in range(2)]
    folders = [save(tmp_path / str(i), model) for i, model in enumerate((base, *after))]
    _, overlaps = compare_checkpoints(folders, [(0, 1), (0, 2)])
    total = overlaps[0, 1].total
    observed, chance, sized = (table["1"] for table in (total.jaccard, total.by_chance, total.by_size_of_weight))
    assert observed is not None
    assert chance is not None
    assert sized is not None
    assert observed > 10 * chance
    # Within a binade a weight may be twice another: half as likely to pass, so the exact chance is a little higher.
    assert observed == pytest.approx(sized, rel=0.15)
    assert total.cosine == pytest.approx(0, abs=5 / 700)
    assert total.same_sign == pytest.approx(0.5, abs=0.01)


def test_no_update_has_no_direction(tmp_path: Path) -> None:
    folders = [save(tmp_path / str(i), draw(0)) for i in range(2)] + [save(tmp_path / "2", draw(1))]
    _, overlaps = compare_checkpoints(folders, [(0, 1), (0, 2)])
    assert overlaps[0, 1].total.cosine is None
    assert overlaps[0, 1].total.same_sign is None
    assert overlaps[0, 1].total.jaccard["1"] == 0
    _, overlaps = compare_checkpoints(folders, [(0, 1), (1, 0)])
    assert overlaps[0, 1].total.jaccard["1"] is None


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    folders = [save(tmp_path / str(i), draw(i)) for i in range(2)]
    seen: list[tuple[int, int]] = []
    compare_checkpoints(folders, [(0, 1)], progress=lambda done, total: seen.append((done, total)), threads=1)
    assert seen[-1] == (2200, 2200)
    assert seen == sorted(seen)
