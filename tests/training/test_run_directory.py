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


def test_random_weights_in_the_place_of_its_checkpoint_are_refused(run: Path) -> None:
    """The lineage would lose its parent."""
    config = MidtrainConfig(run_dir=str(run), model={"model_type": "llama"})
    with pytest.raises(InputError, match=r"began with .*base, not with random weights") as refused:
        check_run_directory(config)
    assert refused.value.exit_code == 2


def test_a_checkpoint_in_the_place_of_its_random_weights_is_refused(tmp_path: Path) -> None:
    """The run would go on from its own checkpoint, and name another as its parent."""
    (tmp_path / "run").mkdir()
    lineage = {"stage": "midtrain", "parents": [], "events": [{"event": "data"}]}
    (tmp_path / "run" / "lineage.json").write_text(json.dumps(lineage))
    base = checkpoint(tmp_path / "base", "{}")
    config = MidtrainConfig(run_dir=str(tmp_path / "run"), init_from=str(base))
    check_run_directory(config)  # nothing was saved: it does begin with this checkpoint
    (tmp_path / "run" / "checkpoints").mkdir()
    checkpoint(tmp_path / "run" / "checkpoints" / "step_00000004", '{"step": 4}')
    with pytest.raises(InputError, match=r"began with random weights, not with .*base") as refused:
        check_run_directory(config)
    assert refused.value.exit_code == 2
    check_run_directory(MidtrainConfig(run_dir=str(tmp_path / "run"), model={"model_type": "llama"}))


@pytest.mark.parametrize("way", ["relative", "link", "dots"])
def test_the_same_start_may_be_written_in_another_way(
    way: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    written = {"relative": "base", "link": "link", "dots": "run/../base"}[way]
    check_run_directory(MidtrainConfig(run_dir=str(run), init_from=written))


def test_a_damaged_lineage_is_named(run: Path) -> None:
    (run / "lineage.json").write_text("[")
    with pytest.raises(InputError, match=r"lineage\.json: not readable"):
        check_run_directory(MidtrainConfig(run_dir=str(run)))
