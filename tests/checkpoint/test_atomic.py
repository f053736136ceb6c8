from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prism_nemo.checkpoint import atomic
from prism_nemo.checkpoint.atomic import MANIFEST, publish, read_manifest, remove_leftovers, temporary_name, write_text
from prism_nemo.errors import InputError


def written(final: Path) -> Path:
    """A temporary directory with two files, one of them below."""
    temporary = temporary_name(final)
    (temporary / "sub").mkdir(parents=True)
    (temporary / "a.bin").write_bytes(b"12345")
    (temporary / "sub/b.bin").write_bytes(b"678")
    return temporary


@pytest.fixture
def published(tmp_path: Path) -> Path:
    publish(written(tmp_path / "final"), tmp_path / "final", {"step": 3})
    return tmp_path / "final"


def test_publish_records_every_file(published: Path) -> None:
    assert read_manifest(published) == {"step": 3, "files": {"a.bin": 5, "sub/b.bin": 3}}
    assert [p.name for p in published.parent.iterdir()] == ["final"]


def test_publish_refuses_an_existing_name(published: Path) -> None:
    temporary = written(published)
    with pytest.raises(InputError, match="final: already exists"):
        publish(temporary, published, {"step": 4})
    assert read_manifest(published)["step"] == 3


def test_everything_is_on_disk_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming before the data is synced can leave a complete name with empty files after a power cut."""
    events: list[str] = []
    rename = os.rename

    def seen(path: Path) -> None:
        events.append(f"sync {Path(path).name}")

    def renamed(old: Path, new: Path) -> None:
        events.append("rename")
        rename(old, new)

    monkeypatch.setattr(atomic, "sync", seen)
    monkeypatch.setattr(atomic.os, "rename", renamed)
    publish(written(tmp_path / "final"), tmp_path / "final", {})
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {f"sync {name}" for name in ("a.bin", "b.bin", MANIFEST)} <= set(before)
    assert after == [f"sync {tmp_path.name}"]


def test_a_file_is_on_disk_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old é")
    events: list[str] = []
    replace, sync = os.replace, atomic.sync

    def synced(path: Path) -> None:
        assert path.read_text(encoding="utf-8") == "new é"
        events.append("sync")
        sync(path)

    def replaced(old: Path, new: Path) -> None:
        assert file.read_text(encoding="utf-8") == "old é"
        events.append("replace")
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync", synced)
        patch.setattr(atomic.os, "replace", replaced)
        write_text(file, "new é")
    assert events == ["sync", "replace"]
    assert file.read_text(encoding="utf-8") == "new é"

    def fail(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_text(file, "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_temporary_directory_is_not_a_checkpoint(tmp_path: Path) -> None:
    temporary = written(tmp_path / "final")
    (temporary / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="not a complete prism-nemo checkpoint"):
        read_manifest(temporary)


def test_directory_without_manifest_is_not_a_checkpoint(published: Path) -> None:
    (published / MANIFEST).unlink()
    with pytest.raises(InputError, match=f"{MANIFEST} is missing"):
        read_manifest(published)


def test_file_cut_short_is_named(published: Path) -> None:
    (published / "sub/b.bin").write_bytes(b"67")
    with pytest.raises(InputError, match=r"sub/b\.bin: has 2 bytes, the manifest says 3"):
        read_manifest(published)


def test_file_grown_is_named(published: Path) -> None:
    (published / "a.bin").write_bytes(b"123456")
    with pytest.raises(InputError, match=r"a\.bin: has 6 bytes, the manifest says 5"):
        read_manifest(published)


def test_missing_file_is_named(published: Path) -> None:
    (published / "a.bin").unlink()
    with pytest.raises(InputError, match=r"a\.bin: missing"):
        read_manifest(published)


def test_damaged_manifest_is_named(published: Path) -> None:
    (published / MANIFEST).write_text('{"step": 3, "fi')
    with pytest.raises(InputError, match=f"{MANIFEST}: not valid JSON"):
        read_manifest(published)


DEAD = 2**22 + 1  # above the largest process id that Linux gives


def folder(path: Path) -> Path:
    path.mkdir()
    (path / "half.bin").write_bytes(b"1")
    return path


@pytest.mark.parametrize(
    ("final", "left"),
    [("step_00000009", "step_00000007"), ("step_00000009", "step_00000009"), ("ckpt", "ckpt")],
    ids=["another step of the run", "the same step", "the same name"],
)
def test_leftovers_of_a_killed_save_are_removed(published: Path, final: str, left: str) -> None:
    leftover = folder(published.with_name(f"{left}.tmp-{DEAD}"))
    assert remove_leftovers(published.with_name(final)) == [leftover]
    assert not leftover.exists()
    assert read_manifest(published)["step"] == 3


def test_our_own_process_id_from_before_is_no_excuse(tmp_path: Path) -> None:
    """In a container every run may have process id 1."""
    leftover = folder(tmp_path / f"ckpt.tmp-{os.getpid()}")
    assert remove_leftovers(tmp_path / "ckpt") == [leftover]


@pytest.mark.parametrize("name", ["notes.tmp-old", "ckpt.tmp-1a", "ckpt.tmp-", f"other.tmp-{DEAD}", "ckpt", "step_1"])
def test_what_no_save_of_this_name_made_is_kept(tmp_path: Path, name: str) -> None:
    """`import --out ./ckpt` must not delete what the user has beside it."""
    kept = folder(tmp_path / name)
    assert remove_leftovers(tmp_path / "ckpt") == []
    assert kept.is_dir()


def test_a_name_is_not_a_pattern(tmp_path: Path) -> None:
    kept = folder(tmp_path / f"axb.tmp-{DEAD}")
    assert remove_leftovers(tmp_path / "a.b") == []
    assert kept.is_dir()


def test_a_file_of_such_a_name_is_kept(tmp_path: Path) -> None:
    (tmp_path / f"ckpt.tmp-{DEAD}").write_text("a file")
    assert remove_leftovers(tmp_path / "ckpt") == []


def test_the_save_of_a_living_process_is_kept(tmp_path: Path) -> None:
    """Two imports of one name, side by side: neither deletes what the other is writing."""
    theirs = folder(tmp_path / f"ckpt.tmp-{os.getppid()}")
    assert remove_leftovers(tmp_path / "ckpt") == []
    assert theirs.is_dir()


def test_no_parent_no_leftovers(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "none/ckpt") == []


def test_manifest_is_json_for_people(published: Path) -> None:
    text = (published / MANIFEST).read_text()
    assert text.endswith("}\n")
    assert text.count("\n") > 3
    assert json.loads(text)["files"]
