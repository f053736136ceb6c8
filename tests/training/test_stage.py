"""What every stage does around its steps."""

from __future__ import annotations

from pathlib import Path

from tiny_training import midtrain_config

from prism_nemo.config import CheckpointConfig
from prism_nemo.runtime.launch import launch
from prism_nemo.training.midtrain import midtrain


def test_only_the_newest_checkpoints_are_kept(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, train_steps=7)
    config.checkpoint = CheckpointConfig(save_interval=2, keep=2)
    launch(midtrain, config)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000006", "step_00000007"]
