"""The RL stage with another sampler than its own weights (a stand-in for vLLM), and what stops it when they part."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_stage_workers as workers
from tiny_training import column, numbers

from prism_nemo.checkpoint.native import find_latest
from prism_nemo.config import (
    CheckpointConfig,
    GRPOConfig,
    OptimizerConfig,
    ParallelConfig,
    RLConfig,
    RolloutConfig,
    ScheduleConfig,
)
from prism_nemo.errors import InputError, PrismError
from prism_nemo.rl.parity import PARITY_LIMIT, check_gap
from prism_nemo.rl.train import check
from prism_nemo.runtime.launch import launch


def run_config(policy: dict[str, str], run_dir: Path, **changes: Any) -> RLConfig:
    """Four steps of 4 prompts with 8 responses of four tokens, at a learning rate that shows at once."""
    rollout = {"group_size": 8, "prompts_per_step": 4, "max_new_tokens": 4, "backend": "vllm"}
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "tasks": ["first-digit"],
        "rollout": RolloutConfig(**{**rollout, **changes.pop("rollout", {})}),
        "grpo": GRPOConfig(kl_beta=0.0, normalize_advantage=False),
        "optimizer": OptimizerConfig(lr=1e-2, weight_decay=0.0, adam_eps=1e-4),
        "schedule": ScheduleConfig(lr_warmup_steps=0, decay="constant"),
        "checkpoint": CheckpointConfig(save_interval=2, keep=10, async_save=False),
        "train_steps": 4,
        "micro_batch_size": 8,
        **policy,
        **changes,
    }
    return RLConfig(**values)


def _run(config: RLConfig, worker: Any = workers.train) -> Path:
    launch(worker, config, processes=config.parallel.world_size)
    return Path(config.run_dir)


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(2, 1)], ids=lambda value: value.describe())
def test_the_sampler_follows_the_policy(parallel: ParallelConfig, policy: dict[str, str], tmp_path: Path) -> None:
    """At every step, also after going on from a checkpoint: two implementations in fp32 differ by rounding, 1e-6.

    At this learning rate one update moves a token's log-probability by 1e-1 (see the next test), so a refit that came
    late, or not at all, would show.
    """
    run = _run(run_config(policy, tmp_path / "run", parallel=parallel, train_steps=2))
    _run(run_config(policy, tmp_path / "run", parallel=parallel, train_steps=4))
    gaps = column(run, "logprob_gap")
    assert [line["step"] for line in numbers(run)] == [1, 2, 3, 4]
    assert max(gaps) < 1e-4
    assert len(column(run, "updates")) == 4
    assert all(line["refit_seconds"] > 0 for line in _lines(run))
    assert sorted(path.name for path in (run / "vllm").iterdir()) == ["config.json"]


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward" in line]


def test_a_sampler_that_stays_behind_stops_the_run_before_its_update(policy: dict[str, str], tmp_path: Path) -> None:
    """Its weights stay those of the first step; the first update shows in the second step, which is not taken."""
    config = run_config(
        policy, tmp_path / "run", checkpoint=CheckpointConfig(save_interval=1, keep=10, async_save=False)
    )
    with pytest.raises(
        PrismError, match=r"step 2: sampler and trainer have parted: .*gap \d.* \(limit 1e-03\)"
    ) as stop:
        _run(config, workers.train_on_an_old_graph)
    assert not isinstance(stop.value, InputError)
    assert [line["step"] for line in numbers(tmp_path / "run")] == [1]
    latest = find_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert latest.name == "step_00000001"


def test_vllm_that_never_got_the_weights_is_refused(policy: dict[str, str], tmp_path: Path) -> None:
    """It begins with random weights, so the first batch shows it."""
    with pytest.raises(InputError, match=r"sampler and trainer disagree: .*The sampler is vllm: the same run with"):
        _run(run_config(policy, tmp_path / "run"), workers.train_without_the_first_refit)
    assert find_latest(tmp_path / "run" / "checkpoints") is None


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"backend": "vlm"}, r"rollout\.backend: 'vlm' is unknown; choose one of native, vllm"),
        ({"backend": "vllm"}, r"rollout\.backend: vllm (is not installed; pip install|needs a CUDA device)"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_backends_that_cannot_be_used(
    rollout: dict[str, Any], message: str, policy: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        check(run_config(policy, tmp_path / "run", rollout=rollout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_is_that_of_the_first_batch(dtype: torch.dtype) -> None:
    limit = PARITY_LIMIT[dtype]
    check_gap({"logprob_gap": 0.99 * limit * 10, "tokens": 10}, dtype, 3)
    with pytest.raises(PrismError, match=r"step 3: .*not applied"):
        check_gap({"logprob_gap": 1.01 * limit * 10, "tokens": 10}, dtype, 3)
    # No tokens, no gap; numbers that are not finite are the step guard's, which leaves the update out.
    for gap, tokens in ((0.0, 0), (math.nan, 10), (math.inf, 10)):
        check_gap({"logprob_gap": gap, "tokens": tokens}, dtype, 3)
