from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from prism_nemo.data.part import Part, PartWriter


def write(path: Path) -> Path:
    writer = PartWriter(path, np.dtype(np.uint16))
    writer.add(np.arange(6), lengths=np.array([1, 2, 3], np.int32), lines=np.array([1, 2, 3]))
    writer.add(np.arange(6, 10), lengths=np.array([4], np.int32), lines=np.array([9]))
    writer.finish({"read": 4})
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    part = Part(write(tmp_path / "a.part"))
    assert (part.documents, part.tokens, part.report) == (4, 10, {"read": 4})
    lines = part.array("lines")
    assert lines is not None
    assert lines.tolist() == [1, 2, 3, 9]
    assert part.array("digests") is None


@pytest.mark.parametrize(
    ("keep", "ids"),
    [
        ("1111", range(10)),
        ("0000", []),
        ("1010", [0, 3, 4, 5]),
        ("0101", [1, 2, 6, 7, 8, 9]),
        ("0110", [1, 2, 3, 4, 5]),
    ],
)
def test_only_the_kept_documents_are_copied(keep: str, ids: list[int], tmp_path: Path) -> None:
    out = io.BytesIO()
    Part(write(tmp_path / "a.part")).copy(np.array([sign == "1" for sign in keep]), out)
    assert np.frombuffer(out.getvalue(), np.uint16).tolist() == list(ids)


@pytest.mark.parametrize("keep", ["1111", "0000", "1010", "0101", "0110"])
def test_the_mask_goes_with_the_documents_and_is_ones_where_there_is_none(keep: str, tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "m.part", np.dtype(np.int32))
    mask = np.array([1, 0, 1, 1, 1, 0, 0, 0, 1, 0], np.uint8)
    writer.add(np.arange(6), lengths=np.array([1, 2, 3], np.int32), loss=mask[:6])
    writer.add(np.arange(6, 10), lengths=np.array([4], np.int32), loss=mask[6:])
    writer.finish({})
    kept = np.array([sign == "1" for sign in keep])
    ids, out, ones = io.BytesIO(), io.BytesIO(), io.BytesIO()
    part = Part(tmp_path / "m.part")
    part.copy(kept, ids)
    part.copy_loss(kept, out)
    assert list(out.getvalue()) == mask[np.frombuffer(ids.getvalue(), np.int32)].tolist()
    Part(write(tmp_path / "a.part")).copy_loss(kept, ones)
    assert ones.getvalue() == b"\1" * len(out.getvalue())


def test_no_shorter_file_opens(tmp_path: Path) -> None:
    data = write(tmp_path / "a.part").read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut.part").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"too short|no closing word"):
            Part(tmp_path / "cut.part")


def test_it_has_its_name_only_when_it_is_whole_and_leaves_nothing_when_given_up(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "a.part", np.dtype(np.uint16))
    writer.add(np.arange(3), lengths=np.array([3], np.int32))
    assert not (tmp_path / "a.part").exists()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
