"""Files are written in windows that go to disk while the next ones fill; nothing of that may change or lose a byte."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from prism_nemo.checkpoint import files
from prism_nemo.checkpoint.files import WriteFile


def written(path: Path, pieces: list[bytes]) -> bytes:
    file = WriteFile(path)
    for piece in pieces:
        file.write(piece)
    assert file.position == sum(map(len, pieces))
    file.sync()
    return path.read_bytes()


@pytest.mark.parametrize("size", [1, 4096, 10_000])
def test_every_byte_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(files, "_WINDOW", 4096)
    pieces = [os.urandom(size) for _ in range(40)]
    assert written(tmp_path / "x", pieces) == b"".join(pieces)


def test_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WINDOW", 64)
    pieces = [os.urandom(100) for _ in range(9)]
    monkeypatch.setattr(files, "_sync_file_range", lambda: None)
    assert written(tmp_path / "x", pieces) == b"".join(pieces)
    monkeypatch.setattr(files, "_sync_file_range", lambda: failing(errno.ENOSYS))
    assert written(tmp_path / "y", pieces) == b"".join(pieces)


def failing(error: int) -> Any:
    def call(*_: Any) -> int:
        ctypes.set_errno(error)
        return -1

    return call


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    monkeypatch.setattr(files, "_WINDOW", 64)
    monkeypatch.setattr(files, "_sync_file_range", lambda: failing(error))
    file = WriteFile(tmp_path / "x")
    with pytest.raises(OSError, match=os.strerror(error)):
        file.write(bytes(200))
    file.close()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, view: real(descriptor, view[:7]))
    assert written(tmp_path / "x", [bytes(range(50))]) == bytes(range(50))


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        WriteFile(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"
