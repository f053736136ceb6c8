"""Which checkpoints stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prism_nemo.checkpoint import retention
from prism_nemo.checkpoint.atomic import publish, temporary_name
from prism_nemo.checkpoint.native import find_latest, step_directory
from prism_nemo.checkpoint.retention import remove_old


def publish_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        temporary = temporary_name(step_directory(folder, step))
        temporary.mkdir()
        (temporary / "a.bin").write_bytes(b"12")
        publish(temporary, step_directory(folder, step), {"step": step})


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_*") if ".tmp-" not in path.name)


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(2, None, [60, 70]), (1, None, [70]), (2, 30, [30, 60, 70]), (1, 20, [20, 40, 60, 70]), (99, None, None)],
)
def test_the_newest_and_every_nth_stay(tmp_path: Path, keep: int, keep_every: int | None, left: list[int]) -> None:
    steps = [10, 20, 30, 40, 50, 60, 70]
    publish_steps(tmp_path, *steps)
    removed = remove_old(tmp_path, keep, keep_every)
    assert steps_in(tmp_path) == (left or steps)
    assert sorted(path.name for path in removed) == [
        step_directory(tmp_path, step).name for step in steps if step not in (left or steps)
    ]
    assert not list(tmp_path.glob("*.tmp-*"))


def test_incomplete_ones_do_not_count(tmp_path: Path) -> None:
    """keep=1 with a newer one that lost a file: the older one is what the run goes on from."""
    publish_steps(tmp_path, 1, 2, 3)
    (step_directory(tmp_path, 3) / "a.bin").unlink()
    remove_old(tmp_path, 1)
    assert steps_in(tmp_path) == [2, 3]
    assert find_latest(tmp_path) == step_directory(tmp_path, 2)


def test_the_newest_stays_whatever_is_asked_for(tmp_path: Path) -> None:
    publish_steps(tmp_path, 5)
    assert remove_old(tmp_path, 0) == []
    assert steps_in(tmp_path) == [5]


def test_other_names_are_not_touched(tmp_path: Path) -> None:
    publish_steps(tmp_path, 1, 2)
    for name in ("damaged_step_00000001_7", "step_00000001.tmp-9", "final", "step_1"):
        (tmp_path / name).mkdir()
    remove_old(tmp_path, 1)
    assert {p.name for p in tmp_path.iterdir()} == {
        "step_00000002",
        "damaged_step_00000001_7",
        "step_00000001.tmp-9",
        "final",
        "step_1",
    }


def test_a_folder_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it deletes, it leaves a leftover that the next run clears, not half a checkpoint."""
    publish_steps(tmp_path, 1, 2)
    seen = []

    def killed(path: Path, **_: object) -> None:
        seen.append(Path(path).name)

    monkeypatch.setattr(retention.shutil, "rmtree", killed)
    remove_old(tmp_path, 1)
    assert seen == [f"step_00000001.tmp-{os.getpid()}"]
    assert steps_in(tmp_path) == [2]
