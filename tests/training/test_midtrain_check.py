"""What mid-training refuses before any process starts, and the guards it runs under."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_training import LLAMA, midtrain_config

from prism_nemo.config import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    MidtrainConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    resolve,
)
from prism_nemo.errors import InputError
from prism_nemo.training.midtrain import check


def _check(tokens: Path, init_from: Path | None, tmp_path: Path, **changes: Any) -> None:
    data = changes.pop("data", None)
    config = midtrain_config(tmp_path / "run", tokens, init_from, **changes)
    config.data = data or config.data
    check(config)


def test_a_good_configuration_passes(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial)
    assert check(config).vocab_size == 255
    config.init_from, config.model = None, dict(LLAMA)
    assert check(config).hidden_size == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 9}, r"global_batch_size 9 is not a multiple of micro_batch_size 2"),
        ({"micro_batch_size": 3}, r"global_batch_size 8 is not a multiple of micro_batch_size 3"),
        (
            {"parallel": ParallelConfig(data_parallel_size=3)},
            r"global_batch_size 8 is not a multiple of .*data_parallel_size 3",
        ),
        (
            {"parallel": ParallelConfig(tensor_model_parallel_size=3)},
            r"tensor_model_parallel_size 3 does not divide.*these do: \[1, 2\]",
        ),
        (
            {"parallel": ParallelConfig(pipeline_model_parallel_size=3)},
            r"pipeline_model_parallel_size 3 does not divide 4 layers; these do: \[1, 2, 4\]",
        ),
        (
            {"parallel": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), "seq_length": 33},
            r"seq_length",
        ),
        ({"seq_length": 65}, r"seq_length 65 .*64"),
        ({"schedule": ScheduleConfig(decay="cosin")}, r"schedule\.decay: 'cosin'.*cosine"),
        ({"schedule": ScheduleConfig(min_lr_ratio=1.5)}, r"min_lr_ratio"),
        ({"micro_batch_size": 0}, r"micro_batch_size"),
        ({"global_batch_size": 0}, r"global_batch_size"),
        ({"train_steps": 0}, r"train_steps"),
        ({"log_interval": 0}, r"log_interval"),
        ({"eval_interval": 0}, r"eval_interval"),
        ({"checkpoint": CheckpointConfig(save_interval=0)}, r"save_interval"),
        ({"checkpoint": CheckpointConfig(keep=0)}, r"keep"),
        ({"parallel": ParallelConfig(data_parallel_size=0)}, r"data_parallel_size"),
        ({"optimizer": OptimizerConfig(lr=math.nan)}, r"optimizer\.lr: nan must be a number of at least 0"),
        ({"optimizer": OptimizerConfig(lr=-1.0)}, r"optimizer\.lr: -1\.0 must be"),
        ({"optimizer": OptimizerConfig(lr=math.inf)}, r"optimizer\.lr: inf must be"),
        ({"optimizer": OptimizerConfig(clip_grad=-1.0)}, r"optimizer\.clip_grad: -1\.0 must be .*\(0: no clipping\)"),
        ({"optimizer": OptimizerConfig(clip_grad=math.nan)}, r"optimizer\.clip_grad: nan must be"),
        ({"optimizer": OptimizerConfig(weight_decay=-0.1)}, r"optimizer\.weight_decay: -0\.1 must be"),
        ({"optimizer": OptimizerConfig(adam_beta1=1.0)}, r"optimizer\.adam_beta1: 1\.0 must be at least 0 and below 1"),
        ({"optimizer": OptimizerConfig(adam_beta2=-0.1)}, r"optimizer\.adam_beta2: -0\.1 must be"),
        ({"optimizer": OptimizerConfig(adam_beta2=math.nan)}, r"optimizer\.adam_beta2: nan must be"),
        ({"optimizer": OptimizerConfig(adam_eps=0.0)}, r"optimizer\.adam_eps: 0\.0 must be a number above 0"),
        ({"optimizer": OptimizerConfig(adam_eps=math.inf)}, r"optimizer\.adam_eps: inf must be"),
        ({"schedule": ScheduleConfig(min_lr_ratio=math.nan)}, r"min_lr_ratio: nan is not between 0 and 1"),
        ({"schedule": ScheduleConfig(lr_warmup_steps=-1)}, r"lr_warmup_steps: -1 is negative"),
        ({"guards": GuardConfig(spike="skp")}, r"guards\.spike: 'skp' is unknown; known: off, warn, skip, rollback"),
        ({"guards": GuardConfig(max_bad_steps=0)}, r"guards\.max_bad_steps: 0 must be at least 1"),
        ({"guards": GuardConfig(spike_z=0.5)}, r"guards\.spike_z: 0\.5 must be above 1"),
        ({"guards": GuardConfig(watchdog_seconds=0)}, r"guards\.watchdog_seconds"),
        ({"guards": GuardConfig(replica_check_interval=-1)}, r"guards\.replica_check_interval"),
    ],
)
def test_numbers_that_cannot_work_are_refused(
    changes: dict[str, Any], message: str, data: Path, initial: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        _check(data, initial, tmp_path, **changes)


def test_the_studys_optimizer_and_no_clipping_pass(data: Path, initial: Path, tmp_path: Path) -> None:
    for optimizer in (
        OptimizerConfig(adam_eps=1e-10, clip_grad=1.0),
        OptimizerConfig(lr=0.0, weight_decay=0.0, adam_beta1=0.0, clip_grad=0.0),
    ):
        _check(data, initial, tmp_path, optimizer=optimizer)


def test_where_the_weights_come_from_must_be_said_once(data: Path, initial: Path, tmp_path: Path) -> None:
    for init_from, model in ((None, None), (initial, dict(LLAMA))):
        with pytest.raises(InputError, match=r"either init_from .* or model"):
            _check(data, init_from, tmp_path, model=model)


def test_a_checkpoint_that_is_not_one_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.*not a complete prism-nemo checkpoint"):
        _check(data, tmp_path / "nowhere", tmp_path)


def test_built_data_is_not_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """Both have a manifest.json."""
    with pytest.raises(InputError, match=r"holds tokens \(of 'prism-nemo data build'\), not a checkpoint"):
        _check(data, data, tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a checkpoint: its manifest\.json names no architecture"):
        _check(data, tmp_path, tmp_path)


def test_a_vocabulary_that_does_not_fit_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocabulary of 100, but the model has 99.*model's tokenizer"):
        _check(data, None, tmp_path, model={**LLAMA, "vocab_size": 99})
    _check(data, None, tmp_path, model={**LLAMA, "vocab_size": 100})


def test_data_that_is_not_there_is_named(initial: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no-data"):
        _check(tmp_path / "no-data", initial, tmp_path)


def test_validation_text_must_exist_and_suffice(data: Path, initial: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no source is called 'hold'.*'held'"):
        _check(data, initial, tmp_path, data=DataConfig(str(data), "hold"))
    with pytest.raises(InputError, match=r"held-out rows|validation_rows"):
        _check(data, initial, tmp_path, data=DataConfig(str(data), "held", validation_rows=10_000))


def test_an_override_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean 'optimizer\.weight_decay'"):
        resolve(MidtrainConfig, {"run_dir": "x", "data": {"path": "y"}}, ["optimizer.weigth_decay=0"])
