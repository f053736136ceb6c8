"""A run that is started again with other settings: told and recorded; refused where they would have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_nemo.config import MidtrainConfig, RLConfig, to_yaml
from prism_nemo.errors import InputError
from prism_nemo.training import other_settings as module
from prism_nemo.training.other_settings import (
    other_settings,
    refuse_another_kind_of_optimizer,
    refuse_other_settings_of_a_finished_run,
)
from prism_nemo.training.stage import check_stage


def _recorded(tmp_path: Path) -> MidtrainConfig:
    config = MidtrainConfig(run_dir=str(tmp_path), train_steps=8)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    return config


def test_what_decides_the_training_is_compared(tmp_path: Path) -> None:
    config = _recorded(tmp_path)
    assert other_settings(config) == []
    config.optimizer.lr = 3e-5
    config.precision.dtype = "bf16"
    config.data.isolate_documents = False
    config.train_steps = 9
    assert other_settings(config) == [
        "data.isolate_documents: True -> False",
        "optimizer.lr: 5e-05 -> 3e-05",
        "train_steps: 8 -> 9",
        "precision.dtype: None -> bf16",
    ]


def test_where_and_how_fast_may_change(tmp_path: Path) -> None:
    config = _recorded(tmp_path)
    config.parallel.tensor_model_parallel_size = 2
    config.recompute.granularity = "full"
    config.checkpoint.keep = 9
    config.monitor.wandb = "offline"
    config.data.path = "moved"
    config.micro_batch_size = 4
    config.log_interval = 3
    config.init_from = "moved"
    assert other_settings(config) == []


def test_values_of_a_mapping_are_compared_too(tmp_path: Path) -> None:
    config = RLConfig(run_dir=str(tmp_path), init_from="i", tokenizer="t", tasks=["a"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    config.rewards.verifiers = {"shorter": "mine:Shorter"}
    config.tasks = ["a", "b"]
    found = other_settings(config)
    assert found == ["tasks: ['a'] -> ['a', 'b']", "rewards.verifiers: {} -> {'shorter': 'mine:Shorter'}"]


@pytest.mark.parametrize("text", ["", "[", "optimizer: 3", "old_name: 1"])
def test_a_record_of_another_version_or_a_damaged_one_says_nothing(text: str, tmp_path: Path) -> None:
    config = _recorded(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    config.optimizer.lr = 1.0
    assert all("lr" not in line for line in other_settings(config))


@pytest.mark.parametrize(("step", "refused"), [(7, False), (8, True), (12, True)])
def test_a_finished_run_with_other_settings_is_refused(
    step: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _recorded(tmp_path)
    monkeypatch.setattr(module, "find_latest", lambda folder: Path(folder) / f"step_{step:08d}")
    refuse_other_settings_of_a_finished_run(config)  # the same again is done, and says so
    config.optimizer.lr = 3e-5
    if not refused:
        refuse_other_settings_of_a_finished_run(config)
        return
    with pytest.raises(InputError, match=rf"is finished \(step {step}\) with other settings: optimizer.lr: 5e-05 -> "):
        refuse_other_settings_of_a_finished_run(config)


@pytest.mark.parametrize("before", [True, False])
def test_the_kind_of_optimizer_stays_once_there_is_a_checkpoint(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron loads neither kind into the other: the names of their tensors differ."""
    config = MidtrainConfig(run_dir=str(tmp_path), use_distributed_optimizer=before)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    config.use_distributed_optimizer = not before
    refuse_another_kind_of_optimizer(config)
    monkeypatch.setattr(module, "find_latest", lambda folder: Path(folder) / "step_00000004")
    words = {True: "true", False: "false"}
    message = f"were saved with {words[before]}, and their optimizer cannot be loaded with {words[not before]}"
    with pytest.raises(InputError, match=message) as refused:
        refuse_another_kind_of_optimizer(config)
    assert refused.value.exit_code == 2
    config.use_distributed_optimizer = before
    refuse_another_kind_of_optimizer(config)


def test_a_stage_checks_the_kind_of_its_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _recorded(tmp_path)
    check_stage(config)
    monkeypatch.setattr(module, "find_latest", lambda folder: Path(folder) / "step_00000004")
    config.use_distributed_optimizer = False
    with pytest.raises(InputError, match="use_distributed_optimizer: the checkpoints of"):
        check_stage(config)
