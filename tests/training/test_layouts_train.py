"""Recomputation, virtual pipelines, overlap: what the parity of losses (test_parity.py) does not show.

Recomputation runs the same kernels on the same numbers: losses and gradients are equal bit for bit, no tolerance.
Whole training at these layouts is compared in test_parity.py, gradients of packed documents in
tests/models/test_packed_documents.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from layout_workers import asked_of_the_trainer, overlapped_weights, packed_row, recomputed, refused_by_build
from test_parity import GRAD_NORM, LOSS, _masked_rows
from tiny_models import save_tiny
from tiny_training import LAYOUTS, midtrain_config
from training_workers import train_from, train_on_rows

from prism_nemo.config import OptimizerConfig, ParallelConfig, RecomputeConfig
from prism_nemo.runtime.launch import launch

SETTINGS = {
    "none": RecomputeConfig(),
    "core_attn": RecomputeConfig("selective"),
    "mlp": RecomputeConfig("selective", modules=["mlp"]),
    "both": RecomputeConfig("selective", modules=["core_attn", "mlp"]),
    "uniform": RecomputeConfig("full"),
    "uniform 2": RecomputeConfig("full", num_layers=2),
    "block 2": RecomputeConfig("full", "block", 2),
}


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(2, sequence_parallel=True)], ids=["1", "tp2-sp"])
def test_recomputation_keeps_less_and_changes_nothing(parallel: ParallelConfig, tmp_path: Path) -> None:
    """A stack that ignores the setting, as Megatron's MambaStack does, keeps what it kept.

    At most: full keeps one input of 4 x 48 bytes per token and layer, and what embedding and loss keep. Without
    recomputation a layer keeps at least its input, queries, keys, values, and both inputs of the MLP's product.
    """
    folders = {case: str(save_tiny(case, tmp_path / case)) for case in ("mistral-window", "granite-hybrid")}
    row = packed_row(149, [7, 16, 1, 40, 64])
    runs = {case: (folder, dict(SETTINGS)) for case, folder in folders.items()}
    runs["granite-hybrid"][1]["uniform 3"] = RecomputeConfig("full", num_layers=3)  # does not divide its 8 layers
    found = launch(recomputed, runs, row, parallel, processes=parallel.world_size)
    assert found["granite-hybrid", "uniform 3"][1:] == (0.0, 0.0)
    for case in folders:
        kept = {name: found[case, name][0] for name in SETTINGS}
        for name in SETTINGS:
            assert found[case, name][1:] == (0.0, 0.0), (case, name)
        assert kept["core_attn"] < kept["none"] - 128 * 24 * 4, case  # at least one layer's copy of the values
        assert kept["mlp"] < 0.8 * kept["none"], case
        assert kept["both"] < min(kept["core_attn"], kept["mlp"]), case
        assert kept["uniform"] < 0.4 * kept["none"], case
        assert kept["uniform"] < kept["block 2"] < kept["none"], case
        assert kept["uniform 2"] < kept["uniform"], case  # fewer inputs


def test_megatrons_default_communication_would_train_on_wrong_numbers(hf_model: Path) -> None:
    """Why batch_p2p_comm is off (models/build.py); and the comparison of losses notices such a fault."""
    steps, optimizer = _masked_rows(3), OptimizerConfig(lr=5e-3, adam_eps=1e-4)
    one = launch(train_on_rows, str(hf_model), ParallelConfig(), steps, 2, optimizer)
    layout = LAYOUTS["PP2 VPP2"]
    for overrides, right in (({}, True), ({"batch_p2p_comm": True, "overlap_p2p_comm": False}, False)):
        found = launch(train_on_rows, str(hf_model), layout, steps, 2, optimizer, overrides, processes=2)
        assert (found["loss"] == pytest.approx(one["loss"], abs=LOSS)) == right
        assert (found["grad_norm"] == pytest.approx(one["grad_norm"], abs=GRAD_NORM)) == right


VPP2, CP2 = LAYOUTS["PP2 VPP2"], LAYOUTS["CP2"]
OVERLAP = LAYOUTS["DP2 overlap"]


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        ("granite-4", VPP2, ParallelConfig(2)),
        ("granite-4", ParallelConfig(1, 2), VPP2),
        ("granite-hybrid-one-group", CP2, VPP2),
        ("granite-hybrid-one-group", VPP2, CP2),
    ],
    ids=["vpp-tp2", "pp2-vpp", "cp2-vpp", "vpp-cp2"],
)
def test_moving_between_layouts(case: str, before: ParallelConfig, after: ParallelConfig, tmp_path: Path) -> None:
    """As test_reshard.py: weights and moments of a virtual pipeline find their parameters again."""
    hf, steps = str(save_tiny(case, tmp_path / "hf")), _masked_rows(4, 149)
    optimizer, saved = OptimizerConfig(lr=2e-3, adam_eps=1e-4, clip_grad=0.5), str(tmp_path / "step")
    whole = launch(train_from, hf, None, None, ParallelConfig(), steps, optimizer)
    first = launch(train_from, hf, None, saved, before, steps[:2], optimizer, processes=before.world_size)
    second = launch(train_from, hf, saved, None, after, steps[2:], optimizer, processes=after.world_size)
    for (loss, norm), (wanted_loss, wanted_norm) in zip([*first, *second], whole, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=LOSS)
        assert norm == pytest.approx(wanted_norm, rel=GRAD_NORM)


def test_overlap_changes_no_weight(hf_model: Path) -> None:
    """Two ranks' gradients have one sum, whatever the buckets; only the norm adds up its squares in another order, by
    which the clip would differ, so there is none: weights are equal bit for bit, also those of the last update."""
    steps, optimizer = _masked_rows(3), OptimizerConfig(lr=5e-3, adam_eps=1e-4, clip_grad=0.0)
    plain = ParallelConfig(data_parallel_size=2)
    results = [
        launch(overlapped_weights, str(hf_model), layout, steps, optimizer, processes=2)
        for layout in (plain, OVERLAP, replace(OVERLAP, overlap_param_gather=False))
    ]
    losses, norms, weights, buckets = results[0]
    assert buckets == 1
    for other_losses, other_norms, other_weights, many in results[1:]:
        assert many > 3
        assert other_losses == losses
        assert other_norms == pytest.approx(norms, rel=1e-6)
        for name, weight in weights.items():
            assert other_weights[name].equal(weight), name


def test_what_returns_one_part_refuses_several(hf_model: Path) -> None:
    message = launch(refused_by_build, str(hf_model), VPP2, processes=2)
    assert message.startswith("parallel.virtual_pipeline_model_parallel_size: only mid-training")


def test_midtraining_recomputes_what_it_is_asked_to(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, recompute=RecomputeConfig("full", "block", 3))
    assert launch(asked_of_the_trainer, config) == {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 3,
    }
