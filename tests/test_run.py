from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from prism_nemo import run as run_module
from prism_nemo.config import MidtrainConfig, load_yaml, resolve
from prism_nemo.errors import InputError
from prism_nemo.run import RunDirectory, last_value, read_metrics, source_commit, versions, write_json


def config() -> MidtrainConfig:
    return resolve(MidtrainConfig, {"run_dir": "r", "data": {"path": "d"}})


def test_begin_records_configuration_and_every_start(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "deep/run")
    run.begin("midtrain", config(), ["ckpt/base"], 0)
    RunDirectory(tmp_path / "deep/run").begin("midtrain", config(), ["ckpt/base"], 40)
    assert resolve(MidtrainConfig, load_yaml(run.path / "config.yaml")) == config()
    lineage = json.loads((run.path / "lineage.json").read_text())
    assert lineage["stage"] == "midtrain"
    assert lineage["parents"] == ["ckpt/base"]
    assert [start["step"] for start in lineage["starts"]] == [0, 40]
    assert lineage["versions"]["megatron-core"] == versions()["megatron-core"]
    assert run.checkpoints.is_dir()


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3, 4):
        run.log({"step": step, "loss": 1 / step})
        run.log({"step": step, "validation_loss": 2.0})
    run.truncate_metrics(2)
    run.log({"step": 3, "loss": 0.1})
    lines = read_metrics(run.metrics_path)
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3]
    assert lines[-1] == {"step": 3, "loss": 0.1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_rollouts_after_the_resumed_step_are_dropped_too(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.rollouts_path.write_text('{"step": 1, "text": "a\\u2028b"}\n{"step": 2}\n{"step": 3, "te')
    run.truncate_metrics(1)
    assert read_metrics(run.rollouts_path) == [{"step": 1, "text": "a\u2028b"}]


def test_newest_value_of_a_metric(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert last_value(run.metrics_path, "loss") is None
    for line in ({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "validation_loss": 3.0}):
        run.log(line)
    assert last_value(run.metrics_path, "loss") == 1.0
    assert last_value(run.metrics_path, "accuracy") is None


def test_line_that_a_kill_cut_short_is_left_out_and_not_glued_to_the_next(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log({"step": 1, "loss": 1.0})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(run.metrics_path) == [{"step": 1, "loss": 1.0}]
    run.truncate_metrics(1)
    run.log({"step": 2, "loss": 0.5})
    assert read_metrics(run.metrics_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_complete_last_line_without_its_newline_is_not_glued_to_the_next(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics_path.write_text('{"step": 1}')
    run.truncate_metrics(1)
    run.log({"step": 2})
    assert read_metrics(run.metrics_path) == [{"step": 1}, {"step": 2}]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not valid JSON"):
        read_metrics(path)


def test_nothing_logged_yet(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.truncate_metrics(0)
    assert read_metrics(run.metrics_path) == []
    assert not run.metrics_path.exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", writes=False)
    run.begin("midtrain", config(), [], 0)
    run.log({"step": 1})
    run.truncate_metrics(0)
    assert list(tmp_path.iterdir()) == []


def test_place_that_is_taken_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match=r"run_dir .*/run: cannot be created"):
        RunDirectory(tmp_path / "run")


def test_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep/lineage.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def no(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_versions_name_what_decides_numbers() -> None:
    assert {"python", "torch", "megatron-core", "transformers", "prism-nemo"} <= versions().keys()
    assert "not installed" not in versions().values()


def _git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not there")
def test_every_start_names_the_commit_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "repository" / "prism_nemo" / "run.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(run_module, "__file__", str(module))

    def found() -> str | None:
        source_commit.cache_clear()
        return source_commit()

    assert found() is None  # an installed package
    _git(tmp_path / "repository", "init", "-q")
    assert found() is None  # without a commit
    _git(tmp_path / "repository", "add", ".")
    _git(tmp_path / "repository", "commit", "-qm", "one")
    head = _git(tmp_path / "repository", "rev-parse", "HEAD")
    (tmp_path / "repository" / "untracked").write_text("")
    assert found() == head
    module.write_text("changed")
    assert found() == head + "+changes"
    run = RunDirectory(tmp_path / "run")
    run.begin("midtrain", config(), [], 0)
    assert json.loads((tmp_path / "run" / "lineage.json").read_text())["starts"][0]["commit"] == head + "+changes"
    monkeypatch.setenv("PATH", "")
    assert found() is None  # no git
    monkeypatch.undo()
    source_commit.cache_clear()
