"""A directory that holds another run is refused before anything starts: that run would be gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_nemo.checkpoint.atomic import MANIFEST
from prism_nemo.checkpoint.hashes import sha256
from prism_nemo.config import MidtrainConfig, RLConfig
from prism_nemo.errors import InputError
from prism_nemo.training.stage import check_run_directory


def checkpoint(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / MANIFEST).write_text(text)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A mid-training stage that began with the checkpoint `base`."""
    base = checkpoint(tmp_path / "base", "{}")
    folder = tmp_path / "run"
    folder.mkdir()
    event = {"event": "started from", "checkpoint": str(base), "manifest_sha256": sha256(base / MANIFEST)}
    (folder / "lineage.json").write_text(json.dumps({"stage": "midtrain", "parents": [str(base)], "events": [event]}))
    return folder


def test_its_own_directory_is_taken(run: Path, tmp_path: Path) -> None:
    check_run_directory(MidtrainConfig(run_dir=str(run), init_from=str(tmp_path / "base")))
    (tmp_path / "base").rename(tmp_path / "moved")
    check_run_directory(MidtrainConfig(run_dir=str(run), init_from=str(tmp_path / "moved")))
    check_run_directory(MidtrainConfig(run_dir=str(tmp_path / "new"), init_from=str(tmp_path / "moved")))


def test_another_stage_is_refused(run: Path, tmp_path: Path) -> None:
    config = RLConfig(run_dir=str(run), init_from=str(tmp_path / "base"), tokenizer="t")
    with pytest.raises(InputError, match="holds a stage of kind midtrain, and this one is rl"):
        check_run_directory(config)


def test_another_start_is_refused(run: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", "{ }")
    with pytest.raises(InputError, match=r"began with .*base, not with .*other"):
        check_run_directory(MidtrainConfig(run_dir=str(run), init_from=str(other)))


def test_a_damaged_lineage_is_named(run: Path) -> None:
    (run / "lineage.json").write_text("[")
    with pytest.raises(InputError, match=r"lineage\.json: not readable"):
        check_run_directory(MidtrainConfig(run_dir=str(run)))
