"""A file is believed only after its header has been checked; then any rows and columns of it can be read."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_files import planned, raw_file

from prism_nemo.checkpoint import safetensors_file
from prism_nemo.checkpoint.hf_writer import write_file
from prism_nemo.checkpoint.safetensors_file import SafetensorsFile
from prism_nemo.errors import InputError

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), dtype=st.sampled_from(TYPES), tail=st.sampled_from([(), (5,), (7, 1), (4, 1, 3)]))
def test_any_rows_and_columns(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: torch.dtype, tail: tuple[int, ...]
) -> None:
    """Files of the safetensors library, read as numpy would slice them."""
    rows = data.draw(st.integers(1, 9))
    first = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(0, rows - first))
    tensor = numbered((rows, *tail), dtype)
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    save_file({"a": torch.ones(3), "b": tensor}, path)
    columns = None
    expected = tensor[first : first + count]
    if tail:
        low = data.draw(st.integers(0, tail[0] - 1))
        columns = (low, data.draw(st.integers(low + 1, tail[0])))
        expected = expected[:, columns[0] : columns[1]]
    out = torch.full(expected.shape, 77.0, dtype=dtype)
    SafetensorsFile(path).read("b", first, out, columns)
    assert torch.equal(out, expected)


@settings(deadline=None, max_examples=30)
@given(shapes=st.lists(st.sampled_from([(3,), (2, 5), (4, 1, 2), (1,)]), min_size=1, max_size=5), data=st.data())
def test_what_we_write_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    tensors = {f"t{i}": numbered(s, data.draw(st.sampled_from(TYPES))) + i for i, s in enumerate(shapes)}
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    write_file(path, planned(tensors))
    back = load_file(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in tensors.items())
    entries = SafetensorsFile(path).entries
    assert all(entries[name].start % t.dtype.itemsize == 0 for name, t in tensors.items())


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**ONE, **changes}}


WRONG: list[tuple[str, Any, bytes, int | None, str]] = [
    ("empty header", b"", b"", None, "a header of 0 bytes"),
    ("absurd length", {}, b"", 2**63, "a header of 9223372036854775808 bytes in a file of 10"),
    ("longer than the file", {}, b"", 3, "a header of 3 bytes in a file of 10"),
    ("not JSON", b'{"a": ', b"", None, "its header is not JSON"),
    ("nested without end", b"[" * 100_000, b"", None, "its header is not JSON"),
    ("not UTF-8", b"\xff\xfe", b"", None, "its header is not JSON"),
    ("a list", [1], b"", None, "its header is not a JSON object"),
    ("named twice", b'{"a": {}, "a": {}}', b"", None, "its header names 'a' twice"),
    ("no dtype", {"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), None, "tensor 'a' contradicts itself"),
    ("unknown dtype", entry(dtype="F4"), bytes(8), None, "tensor 'a' contradicts itself"),
    ("not a mapping", {"a": 3}, bytes(8), None, "tensor 'a' contradicts itself"),
    ("shape and offsets", entry(shape=[3]), bytes(8), None, "tensor 'a' contradicts itself"),
    ("negative shape", entry(shape=[-2]), bytes(8), None, "tensor 'a' contradicts itself"),
    ("negative offset", entry(data_offsets=[-8, 0]), bytes(8), None, "tensor 'a' contradicts itself"),
    ("a fraction", entry(shape=[2.0]), bytes(8), None, "tensor 'a' contradicts itself"),
    ("three offsets", entry(data_offsets=[0, 4, 8]), bytes(8), None, "tensor 'a' contradicts itself"),
    ("outside", entry(data_offsets=[8, 16]), bytes(8), None, "tensor 'a' leaves a hole after the header"),
    ("overlap", {"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12), None, "tensor 'b' overlaps 'a'"),
    ("hole", {"a": ONE, "b": {**ONE, "data_offsets": [9, 17]}}, bytes(17), None, "tensor 'b' leaves a hole after 'a'"),
    ("too short", {"a": ONE}, bytes(7), None, "its tensors end at byte"),
    ("too long", {"a": ONE}, bytes(9), None, "its tensors end at byte"),
]


@pytest.mark.parametrize(("header", "data", "length", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_header_that_lies(tmp_path: Path, header: Any, data: bytes, length: int | None, message: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(InputError, match=r"x\.safetensors: truncated or not a safetensors file \(") as caught:
        SafetensorsFile(path)
    assert message in str(caught.value)


def test_shapes_whose_product_is_absurd(tmp_path: Path) -> None:
    """Python's integers do not wrap around, as those of the formats' other readers might."""
    header = entry(shape=[2**40, 2**40], data_offsets=[0, 2**64 % 2**32])
    with pytest.raises(InputError, match="contradicts itself"):
        SafetensorsFile(raw_file(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I32", "F64"])
def test_unsupported_type_is_named(tmp_path: Path, dtype: str) -> None:
    size = {"F8_E4M3": 1, "I32": 4, "F64": 8}[dtype]
    file = SafetensorsFile(
        raw_file(tmp_path / "x.safetensors", entry(dtype=dtype, data_offsets=[0, 2 * size]), bytes(2 * size))
    )
    with pytest.raises(InputError, match=f"tensor 'a' is of type {dtype}; supported: F32, BF16, F16"):
        file.dtype("a")


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    file = SafetensorsFile(raw_file(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, "a": ONE}, bytes(8)))
    assert list(file.entries) == ["a"]


def test_symbolic_links(tmp_path: Path) -> None:
    """The hub's cache is made of links, so links are followed; one that leads to itself is no file."""
    raw_file(tmp_path / "blob", {"a": ONE}, bytes(8))
    (tmp_path / "link.safetensors").symlink_to("blob")
    assert list(SafetensorsFile(tmp_path / "link.safetensors").entries) == ["a"]
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(InputError, match=r"loop\.safetensors: cannot be opened: Too many levels of symbolic links"):
        SafetensorsFile(tmp_path / "loop.safetensors")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        SafetensorsFile(tmp_path)


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    file = SafetensorsFile(raw_file(tmp_path / "x.safetensors", {"a": ONE}, bytes(8)))
    os.truncate(tmp_path / "x.safetensors", 20)
    with pytest.raises(InputError, match=r"x\.safetensors: shorter than its header says .ends before byte 77"):
        file.read("a", 0, torch.empty(2))


def test_columns_far_into_a_file(tmp_path: Path) -> None:
    """Beyond the first page, where a mapping of the file begins before the tensor does."""
    tensor = numbered((3000, 4), torch.float32)
    save_file({"a": numbered((5001,), torch.float16), "b": tensor}, tmp_path / "x.safetensors")
    out = torch.empty(700, 2)
    SafetensorsFile(tmp_path / "x.safetensors").read("b", 2100, out, (1, 3))
    assert torch.equal(out, tensor[2100:2800, 1:3])


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(safetensors_file.os, "preadv", lambda fd, into, at: real(fd, [into[0][:3]], at))
    tensor = numbered((5, 3), torch.float32)
    save_file({"a": tensor}, tmp_path / "x.safetensors")
    out = torch.empty(5, 3)
    SafetensorsFile(tmp_path / "x.safetensors").read("a", 0, out)
    assert torch.equal(out, tensor)
