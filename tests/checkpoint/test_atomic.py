from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prism_nemo.checkpoint import atomic
from prism_nemo.checkpoint.atomic import MANIFEST, publish, read_manifest, remove_leftovers, temporary_name
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

    monkeypatch.setattr(atomic, "_sync", seen)
    monkeypatch.setattr(atomic.os, "rename", renamed)
    publish(written(tmp_path / "final"), tmp_path / "final", {})
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {f"sync {name}" for name in ("a.bin", "b.bin", MANIFEST)} <= set(before)
    assert after == [f"sync {tmp_path.name}"]


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


def test_leftovers_of_a_killed_save_are_removed(published: Path) -> None:
    other = published.with_name("step_00000007.tmp-999999999")
    other.mkdir()
    (other / "half.bin").write_bytes(b"1")
    assert remove_leftovers(published.parent) == [other]
    assert not other.exists()
    assert read_manifest(published)["step"] == 3


def test_a_file_of_such_a_name_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.tmp-1").write_text("a file")
    assert remove_leftovers(tmp_path) == []
    assert (tmp_path / "x.tmp-1").exists()


def test_a_folder_that_no_save_made_is_kept(tmp_path: Path) -> None:
    """`import --out ./ckpt` must not delete what the user has beside it."""
    (tmp_path / "notes.tmp-old").mkdir()
    remove_leftovers(tmp_path)
    assert (tmp_path / "notes.tmp-old").is_dir()


def test_the_save_of_a_living_process_is_kept(tmp_path: Path) -> None:
    """Two imports into one folder, side by side: neither deletes what the other is writing."""
    theirs = tmp_path / f"other.tmp-{os.getppid()}"
    theirs.mkdir()
    remove_leftovers(tmp_path)
    assert theirs.is_dir()


def test_manifest_is_json_for_people(published: Path) -> None:
    text = (published / MANIFEST).read_text()
    assert text.endswith("}\n")
    assert text.count("\n") > 3
    assert json.loads(text)["files"]
