"""Null models against weights that were made, moved and rounded."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_nemo.analysis.change import WeightChange, change_of
from prism_nemo.analysis.nulls import Null, Schedule, decay, fitted, gaussian, gaussian_levels, nulls_of, to_bf16
from prism_nemo.analysis.tally import Tally
from prism_nemo.analysis.weights import compare_weights

NAME = "model.layers.0.mlp.up_proj.weight"
COUNT = 2_000_000
# Of N weights, a share s is known to sqrt(s (1 - s) / N): 4 of these for s = 0.5 are 1.4e-3.
SPREAD = 4 * math.sqrt(0.25 / COUNT)


def weights(seed: int = 0, scale: float = 0.02) -> Tensor:
    return scale * torch.randn(1000, COUNT // 1000, generator=torch.Generator().manual_seed(seed))


def observed(tmp_path: Path, before: Tensor, after: Tensor) -> tuple[WeightChange, Tally]:
    for name, tensor in (("a", before), ("b", after)):
        (tmp_path / name).mkdir()
        save_file({NAME: tensor.contiguous()}, tmp_path / name / "model.safetensors")
    tally = compare_weights(tmp_path / "a", tmp_path / "b").tallies[NAME]
    return change_of(tally), tally


def agrees(null: Null, seen: WeightChange, spread: float = SPREAD) -> None:
    assert null.thresholds == pytest.approx(seen.thresholds, abs=spread)
    assert null.equal_fraction == pytest.approx(seen.equal_fraction, abs=spread)
    assert null.relative_l2 == pytest.approx(seen.relative_l2, rel=0.02)
    assert null.deciles == pytest.approx(seen.deciles, abs=math.sqrt(10) * spread + 2e-3)


@pytest.mark.parametrize("scale", [1e-5, 2e-4, 5e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gaussian_that_was_added(tmp_path: Path, scale: float, dtype: torch.dtype) -> None:
    """In fp32 the table has the next smaller magnitudes of bf16: a share is 2^-9 of itself higher at most."""
    before = weights().to(dtype)
    noise = scale * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    after = (before.float() + noise).to(dtype)
    seen, tally = observed(tmp_path, before, after)
    # A weight in bf16 that does not move has a smaller update than the one that was added.
    null = gaussian("random_walk", tally, scale, dtype == torch.bfloat16)
    assert null.thresholds == pytest.approx(seen.thresholds, abs=SPREAD + 2**-9)
    assert null.equal_fraction == pytest.approx(seen.equal_fraction, abs=SPREAD + 1e-3)
    assert null.bf16_equal_fraction == pytest.approx(seen.bf16_equal_fraction, abs=SPREAD + 1e-3)
    assert null.sign_flip_fraction == pytest.approx(seen.sign_flip_fraction, abs=SPREAD)
    if dtype == torch.float32:
        agrees(null, seen, SPREAD + 2**-9)
    fit = fitted(tally, dtype == torch.bfloat16)
    assert fit is not None
    assert fit.scale == pytest.approx(scale, rel=0.02)


def test_weight_decay_alone(tmp_path: Path) -> None:
    """A factor of 0.99 in bf16: every weight near 1 % below, rounded up or down to where it can be stored."""
    before = weights().bfloat16()
    for i, factor in enumerate((0.934, 0.99, 0.999)):
        (tmp_path / str(i)).mkdir()
        after = (before.double() * factor).float().bfloat16()
        seen, tally = observed(tmp_path / str(i), before, after)
        null = decay(tally, factor, True)
        assert null.thresholds == pytest.approx(seen.thresholds, abs=1e-9)
        assert null.equal_fraction == pytest.approx(seen.equal_fraction, abs=1e-9)
        assert null.sign_flip_fraction == seen.sign_flip_fraction == 0
    (tmp_path / "fp32").mkdir()
    seen, tally = observed(tmp_path / "fp32", weights(), 0.999 * weights())
    null = decay(tally, 0.999, False)
    assert null.bf16_equal_fraction == pytest.approx(seen.bf16_equal_fraction, abs=SPREAD + 1e-3)


def test_the_threshold_table_of_the_study(tmp_path: Path) -> None:
    """One scale gives the six shares that arXiv 2603.17074 prints for MT to RL (Table 22: 17.7 ... 0.5 % changed).

    Weights are made, an update of 7.85e-4 of their size that knows nothing of them is added, all rounded to bf16.
    """
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2000, 2000, generator=generator).bfloat16()
    after = (before.float() + 7.85e-4 * torch.randn(2000, 2000, generator=generator)).bfloat16()
    seen, tally = observed(tmp_path, before, after)
    stated = {"0.1": 0.177, "0.5": 0.127, "1": 0.050, "2": 0.025, "5": 0.010, "10": 0.005}
    for found in (seen, fitted(tally, True)):
        assert found is not None
        shares = {key: round(share, 3) for key, share in found.thresholds.items()}
        # 17.9 to 18.0 % at 0.1 % where the study prints 17.7; the others to the digit that is printed.
        assert shares == pytest.approx({**stated, "0.1": 0.179}, abs=1.1e-3)


def test_a_schedule_is_summed_over_its_steps() -> None:
    """The study's mid-training as far as it is stated: weight decay 0.1 takes 6.6 % where the rates sum to 0.686."""
    schedule = Schedule.of([1e-4] * 6860, 0.1)
    assert schedule.lr_sum == pytest.approx(0.686)
    assert schedule.decay_factor == pytest.approx(math.exp(-0.0686), rel=1e-4)
    both = schedule.then(Schedule.of([3.0], 0.0))
    assert both.lr_sum == pytest.approx(3.686)
    assert both.lr_square_sum == pytest.approx(6860e-8 + 9)
    assert (both.decay_factor, both.steps) == (schedule.decay_factor, 6861)


def test_which_nulls_there_are(tmp_path: Path) -> None:
    before = weights()
    _, tally = observed(tmp_path, before, before * 1.02)
    nulls = nulls_of(tally, False, Schedule.of([1e-3, 3e-3], 0.1))
    assert [null.name for null in nulls] == ["decay", "random_walk", "drift"]  # every weight passed 1 %: nothing to fit
    assert [null.scale for null in nulls] == pytest.approx([1 - (1 - 1e-4) * (1 - 3e-4), 1e-3 * math.sqrt(10), 4e-3])
    undecayed = nulls_of(tally, False, Schedule.of([1e-3], 0.1), decayed=False)
    assert [null.name for null in undecayed] == ["random_walk", "drift"]
    assert nulls_of(tally, False, None) == []


@pytest.mark.parametrize("bf16", [False, True])
def test_without_an_update_every_null_stays_where_it_is(tmp_path: Path, bf16: bool) -> None:
    before = weights()
    before[0] = 0.0
    seen, tally = observed(tmp_path, before, before)
    for null in nulls_of(tally, bf16, Schedule.of([], 0.1)):
        assert (null.thresholds, null.equal_fraction) == (seen.thresholds, 1.0), null.name
        assert (null.relative_l2, null.sign_flip_fraction) == (0.0, 0.0), null.name


@pytest.mark.parametrize("bf16", [False, True])
def test_levels_are_probabilities(bf16: bool) -> None:
    sizes = to_bf16(np.geomspace(1e-12, 10, 300))
    sizes[0] = 0.0
    found = gaussian_levels(sizes, 1e-3, bf16)
    assert found.min() >= -1e-15
    assert found.sum(axis=1) == pytest.approx(np.ones(300))
    assert found[0, -1] == pytest.approx(1.0)  # whatever zero becomes is beyond every threshold
    assert found[-1, 0] == pytest.approx(1.0 if bf16 else 0.0)


def test_rounding_is_torchs() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double()
    assert np.array_equal(to_bf16(values.numpy()), values.float().bfloat16().double().numpy())
