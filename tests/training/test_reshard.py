"""A run that changes its layout between two steps goes on with the same numbers, for every family.

Weights and both Adam moments must find their parameters again: cut elsewhere, on other stages, and, for a Mamba mixer
with fewer groups than ranks, in other parameters altogether.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_parity import GRAD_NORM, LOSS, _masked_rows
from tiny_models import save_tiny
from training_workers import train_from

from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.runtime.launch import launch

ONE, TP2, PP2 = ParallelConfig(), ParallelConfig(2), ParallelConfig(1, 2)


@pytest.mark.parametrize(
    ("before", "after"), [(ONE, TP2), (TP2, ONE), (ONE, PP2), (PP2, TP2)], ids=["1-tp2", "tp2-1", "1-pp2", "pp2-tp2"]
)
@pytest.mark.parametrize("case", ["granite-4", "granite-hybrid-one-group", "nemotron-h"])
def test_another_layout_continues(case: str, before: ParallelConfig, after: ParallelConfig, tmp_path: Path) -> None:
    hf, steps = str(save_tiny(case, tmp_path / "hf")), _masked_rows(4, 149)
    optimizer, saved = OptimizerConfig(lr=2e-3, adam_eps=1e-4, clip_grad=0.5), str(tmp_path / "step")
    whole = launch(train_from, hf, None, None, ONE, steps, optimizer)
    first = launch(train_from, hf, None, saved, before, steps[:2], optimizer, processes=before.world_size)
    second = launch(train_from, hf, saved, None, after, steps[2:], optimizer, processes=after.world_size)
    for (loss, norm), (wanted_loss, wanted_norm) in zip([*first, *second], whole, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=LOSS)
        assert norm == pytest.approx(wanted_norm, rel=GRAD_NORM)
