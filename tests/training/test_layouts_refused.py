"""Layouts and recomputation that cannot work are refused before any process starts, and the message says what does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny
from tiny_training import LLAMA, midtrain_config

from prism_nemo.config import MidtrainConfig, ParallelConfig, RecomputeConfig, resolve
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, architecture_from_hf, read_hf_config
from prism_nemo.training.layout import check_batch, check_layout
from prism_nemo.training.midtrain import check

# 4 layers, 4 heads, 2 groups.
VPP = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        ({"context_parallel_size": 0}, {}, r"parallel\.context_parallel_size: 0 must be at least 1"),
        ({"virtual_pipeline_model_parallel_size": 0}, {}, r"parallel\.virtual_pipeline_model_parallel_size: 0 must"),
        ({"context_parallel_size": 3}, {}, r"context_parallel_size 3 .*4 attention heads.*these do: \[1, 2, 4\]"),
        (
            {"tensor_model_parallel_size": 2, "context_parallel_size": 4},
            {},
            r"context_parallel_size 4 at tensor_model_parallel_size 2 .*these do: \[1, 2\]",
        ),
        ({"context_parallel_size": 2}, {"seq_length": 33}, r"seq_length 33 .*context_parallel_size 2; 32 would be"),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
            {"seq_length": 30},
            r"seq_length 30 .*tensor_model_parallel_size 2 x context_parallel_size 2 .*; 32 would be",
        ),
        ({"virtual_pipeline_model_parallel_size": 2}, {}, r"needs pipeline_model_parallel_size 2 or more"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            {},
            r"virtual_pipeline_model_parallel_size 4 does not divide the 2 layers of each of 2.*these do: \[1, 2\]",
        ),
        (VPP, {"micro_batch_size": 8}, r"rounds of pipeline_model_parallel_size 2, but a step has 1; .*16 would do"),
        (
            VPP,
            {"micro_batch_size": 2, "global_batch_size": 6},
            r"a step has 3; global_batch_size 8 would do, or virtual_pipeline_model_parallel_size 1",
        ),
        ({"sequence_parallel": True}, {}, r"sequence_parallel .*needs tensor_model_parallel_size 2 or more \(\[1, 2\]"),
        ({"overlap_param_gather": True}, {}, r"overlap_param_gather needs parallel\.overlap_grad_reduce=true"),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True},
            {"use_distributed_optimizer": False},
            r"overlap_param_gather: only the distributed optimizer.*use_distributed_optimizer=true",
        ),
        ({"bucket_size": 1000}, {}, r"bucket_size: without parallel\.overlap_grad_reduce there is one bucket"),
        ({"bucket_size": 0, "overlap_grad_reduce": True}, {}, r"bucket_size: 0 must be at least 1"),
        ({}, {"recompute": RecomputeConfig("ful")}, r"recompute\.granularity: 'ful'.*none, selective, full"),
        ({}, {"recompute": RecomputeConfig("full", "all")}, r"recompute\.method: 'all'.*uniform, block"),
        ({}, {"recompute": RecomputeConfig("full", num_layers=0)}, r"recompute\.num_layers: 0 must be at least 1"),
        (
            VPP,
            {"recompute": RecomputeConfig("full", num_layers=2)},
            r"recompute\.num_layers 2 does not divide the 1 layers of each part .*these do: \[1\]",
        ),
        (
            {},
            {"recompute": RecomputeConfig("selective", modules=["core_attn", "moe"])},
            r"recompute\.modules: moe cannot .*core_attn, mlp",
        ),
        ({}, {"recompute": RecomputeConfig("selective", modules=[])}, r"recompute\.modules: .*at least one"),
    ],
)
def test_what_cannot_work_is_refused(
    parallel: dict[str, Any], changes: dict[str, Any], message: str, data: Path, initial: Path, tmp_path: Path
) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, parallel=ParallelConfig(**parallel), **changes)
    with pytest.raises(InputError, match=message):
        check(config)


def test_what_works_is_not_refused(data: Path, initial: Path, tmp_path: Path) -> None:
    for parallel, changes in (
        ({**VPP, "context_parallel_size": 4}, {"recompute": RecomputeConfig("full")}),
        ({"overlap_param_gather": True, "overlap_grad_reduce": True, "bucket_size": 1000}, {}),
        ({}, {"recompute": RecomputeConfig("selective", modules=["core_attn", "mlp"])}),
        ({"pipeline_model_parallel_size": 2}, {"recompute": RecomputeConfig("full", "block", 3)}),
    ):
        check(midtrain_config(tmp_path / "run", data, initial, parallel=ParallelConfig(**parallel), **changes))


def test_every_refusal_names_sizes_that_pass(tmp_path: Path) -> None:
    """Of all layouts up to eight each way: what the message offers is accepted."""
    cases = [architecture_from_hf(dict(LLAMA), "llama")]
    cases += [read_hf_config(save_tiny(c, tmp_path / c)) for c in ("granite-hybrid-one-group", "nemotron-h")]
    refused = 0
    for a in cases:
        for tp in (1, 2):
            for cp in range(1, 9):
                refused += _offers_pass(a, ParallelConfig(tp, context_parallel_size=cp), "context_parallel_size")
        for pp in (2, 4):
            for parts in range(1, 5):
                layout = ParallelConfig(1, pp, virtual_pipeline_model_parallel_size=parts)
                refused += _offers_pass(a, layout, "virtual_pipeline_model_parallel_size")
    assert refused > 20


def _offers_pass(a: Architecture, layout: ParallelConfig, name: str) -> bool:
    try:
        check_layout(a, layout, True)
    except InputError as error:
        offered = str(error).partition("these do: [")[2].rstrip("]").split(", ")
        assert getattr(layout, name) not in map(int, offered)
        for size in offered:
            check_layout(a, ParallelConfig(**{**vars(layout), name: int(size)}), True)
        return True
    return False


def test_offered_batches_pass() -> None:
    layout = ParallelConfig(1, 4, 2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(InputError, match="global_batch_size 16 would do"):
        check_batch(layout, 32, 1, 14)
    check_batch(layout, 32, 1, 16)


def test_settings_come_by_name() -> None:
    overrides = ["parallel.context_parallel_size=2", "recompute.granularity=full", "recompute.num_layers=2"]
    config = resolve(MidtrainConfig, {"run_dir": "x", "data": {"path": "y"}}, overrides)
    assert config.parallel.describe() == "TP1 PP1 CP2 DP1"
    assert config.parallel.world_size == 2
    assert config.recompute == RecomputeConfig("full", num_layers=2)
