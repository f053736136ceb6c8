"""Each kind of damage: refused with file and line, or counted with its first example where the mixture allows some."""

from __future__ import annotations

import errno
import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_text import words, write_jsonl

from prism_nemo.data.build import Manifest, build_mixture, load_manifest
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.tokenizer import Tokenizer, check_vocabulary
from prism_nemo.errors import InputError, PrismError

GOOD = b'{"text": "aa bb"}\n'
BAD_LINES = {
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "not JSON": b'{"text": "cut in ha',
    "NUL byte": b'{"text": "a\\u0000b"}',
    "half a surrogate pair": b'{"text": "\\udc00"}',
    "missing or wrong field": b'{"txt": "a"}',
    "not an object": b"[1]",
    "too long": b'{"text": "' + b"a" * 3000 + b'"}',
}


def source(*paths: Path, **more: Any) -> Mixture:
    return Mixture("m", [Source("s", "d", [str(path) for path in paths], 1.0, **more)])


def texts_of(manifest: Manifest, tokenizer: Tokenizer, name: str = "s") -> list[str]:
    dataset = IndexedDataset(manifest.prefix(name))
    return [tokenizer.decode(dataset[i].tolist()[:-1]) for i in range(len(dataset))]


@pytest.mark.parametrize("kind", BAD_LINES)
def test_one_bad_line_is_refused_by_default(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + BAD_LINES[kind] + b"\n" + GOOD)
    with pytest.raises(InputError, match=r"a\.jsonl:3: "):
        build_mixture(source(file, max_document_bytes=2000), tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_within_the_limit_are_counted_with_the_first_of_each_kind(
    workers: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"".join(line + b"\n" + GOOD for line in BAD_LINES.values()) * 2 + b"\n")
    # Small units: line numbers must be those of the file all the same.
    monkeypatch.setattr("prism_nemo.data.units.UNIT_BYTES", 50)
    said: list[str] = []
    manifest = build_mixture(
        source(file, max_bad=14, max_document_bytes=2000), tokenizer, tmp_path / "out", workers=workers,
        progress=said.append,
    )  # fmt: skip
    report = manifest.source("s").report
    assert report["read"] == 30
    assert report["empty"] == 1
    for i, kind in enumerate(BAD_LINES):
        assert report["bad"][kind]["count"] == 2
        assert report["bad"][kind]["first"].startswith(f"{file}:{2 * i + 2}: ")
    assert texts_of(manifest, tokenizer) == ["aa bb"] * 15
    assert any("2 unreadable, NUL byte" in line and f"{file}:6" in line for line in said)


def test_one_more_than_the_limit_is_refused_also_when_the_limit_is_lowered_later(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"{\n{\n")
    with pytest.raises(InputError, match=r"2 documents cannot be read, max_bad is 1; the first: .*a\.jsonl:2"):
        build_mixture(source(file, max_bad=1), tokenizer, tmp_path / "out")
    build_mixture(source(file, max_bad=2), tokenizer, tmp_path / "out")
    for limit in (1, 0):
        with pytest.raises(InputError, match=r"a\.jsonl:2"):
            build_mixture(source(file, max_bad=limit), tokenizer, tmp_path / "out")


def test_a_line_of_100_megabytes_is_passed_over_in_bounded_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with open(file, "wb") as stream:
        stream.write(GOOD + b'{"text": "')
        for _ in range(100):
            stream.write(b"a" * 1_000_000)
        stream.write(b'"}\n' + GOOD)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = build_mixture(source(file, max_bad=1, max_document_bytes=1 << 20), tokenizer, tmp_path / "out")
    assert texts_of(manifest, tokenizer) == ["aa bb", "aa bb"]
    assert manifest.source("s").report["bad"]["too long"]["first"].startswith(f"{file}:2: has 100,000,0")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kilobytes


def test_empty_documents_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["", "aa", " \n ", ""])
    report = build_mixture(source(file), tokenizer, tmp_path / "out").source("s").report
    assert (report["read"], report["empty"]) == (4, 3)


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "bytes", "not at all"])
def test_a_compressed_file_that_is_cut_short_or_damaged(
    kind: str, damage: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = b"".join(json.dumps({"text": words("abc", 30, i)}).encode() + b"\n" for i in range(500))
    whole = gzip.compress(lines) if kind == "gz" else zstandard.compress(lines)
    file = tmp_path / f"a.jsonl.{kind}"
    middle = len(whole) // 2
    file.write_bytes({"cut": whole[:middle], "bytes": whole[:middle] + b"\0" * 40, "not at all": lines}[damage])
    with pytest.raises(InputError, match=rf"a\.jsonl\.{kind}: the (gzip|zstd) stream is damaged after line \d+"):
        build_mixture(source(file, max_bad=10**6), tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_several_frames_in_one_file_are_one_stream(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    compress = gzip.compress if kind == "gz" else zstandard.compress
    file = tmp_path / f"a.jsonl.{kind}"
    file.write_bytes(compress(b'{"text": "a') + compress(b'a"}\n') + compress(GOOD))
    assert texts_of(build_mixture(source(file), tokenizer, tmp_path / "out"), tokenizer) == ["aa", "aa bb"]


def test_parquet_rows_become_documents_in_order(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [words("abc", 9, i) for i in range(700)]
    table = pa.table({"body": texts, "score": list(range(700)), "m": [{"lang": "py"}] * 700})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    monkeypatch.setattr("prism_nemo.data.units.UNIT_BYTES", 9000)
    mixture = source(tmp_path / "a.parquet", text_field="body", filter=["score >= 3 and m.lang == 'py'"])
    for workers in (1, 2):
        manifest = build_mixture(mixture, tokenizer, tmp_path / f"out{workers}", workers=workers)
        assert texts_of(manifest, tokenizer) == texts[3:]
    assert manifest.source("s").report["filtered"] == {"score >= 3 and m.lang == 'py'": 3}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"text": [1, 2]}, "column 'text' must be text, it is int64"),
        ({"text": [["a"]]}, "column 'text' must be text, it is list"),
        ({"body": ["a"]}, "has no column 'text'; its columns: body"),
        ({"text": pa.array([b"a", b"\xff"])}, "must be text, it is binary"),
    ],
)
def test_a_parquet_column_of_the_wrong_type(
    column: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pq.write_table(pa.table(column), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"a\.parquet: .*{message}"):
        build_mixture(source(tmp_path / "a.parquet", max_bad=99), tokenizer, tmp_path / "out")


def test_parquet_rows_that_are_null_or_not_utf8_and_a_file_cut_short(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    broken = pa.array([b"ok", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": pa.chunked_array([pa.array(["aa", None]), broken])}), file)
    with pytest.raises(InputError, match=r"a\.parquet:2: field 'text' must be text, found NoneType"):
        build_mixture(source(file), tokenizer, tmp_path / "out")
    manifest = build_mixture(source(file, max_bad=2), tokenizer, tmp_path / "out")
    assert texts_of(manifest, tokenizer) == ["aa", "ok"]
    assert manifest.source("s").report["bad"]["not UTF-8"]["first"].startswith(f"{file}:4: ")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\.parquet: is no whole Parquet file"):
        build_mixture(source(file), tokenizer, tmp_path / "out")


def test_megatron_tokens_are_taken_as_they_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [words("abc", 5, i) for i in range(20)]
    first = build_mixture(source(write_jsonl(tmp_path / "a.jsonl", texts)), tokenizer, tmp_path / "one")
    prefix = Path(first.prefix("s"))
    second = build_mixture(source(prefix.with_suffix(".bin")), tokenizer, tmp_path / "two")
    for suffix in (".bin", ".idx"):
        assert Path(second.prefix("s") + suffix).read_bytes() == prefix.with_suffix(suffix).read_bytes()
    smaller = Tokenizer(tokenizer._inner, tokenizer.path, "1" * 64, tokenizer.eos_id, tokenizer.pad_id)
    smaller.vocab_size = 10
    with pytest.raises(InputError, match=r"\.bin:1: holds token \d+, but the tokenizer .* has 10"):
        build_mixture(source(prefix.with_suffix(".bin")), smaller, tmp_path / "three")
    bin_file = prefix.with_suffix(".bin")
    bin_file.write_bytes(bin_file.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"its index needs"):
        build_mixture(source(bin_file), tokenizer, tmp_path / "three")
    prefix.with_suffix(".idx").write_bytes(b"MMID")
    with pytest.raises(InputError, match="is not an index of Megatron's"):
        build_mixture(source(bin_file), tokenizer, tmp_path / "three")


def test_a_tokenizer_larger_than_the_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": tokenizer.vocab_size - 1}))
    with pytest.raises(
        InputError, match=rf"has {tokenizer.vocab_size} tokens, but the model .* {tokenizer.vocab_size - 1}"
    ):
        check_vocabulary(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": tokenizer.vocab_size}))
    check_vocabulary(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="vocab_size"):
        check_vocabulary(tokenizer, tmp_path)


FULL_DISK = """
import resource, signal, sys
from prism_nemo.data.build import build_mixture
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.errors import PrismError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
try:
    build_mixture(Mixture("m", [Source("s", "d", [sys.argv[1]], 1.0)]), load_tokenizer(sys.argv[2]), sys.argv[3])
except PrismError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("room", [100, 5000, 15_000])
def test_a_full_disk_leaves_nothing_that_opens_and_the_next_run_continues(
    room: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    # A limit on the size of files fails writes as a full disk does, and needs no disk of its own.
    file = write_jsonl(tmp_path / "a.jsonl", [words("abcdef", 200, i) for i in range(40)])
    out = tmp_path / "out"
    arguments = [str(file), str(tokenizer.path), str(out), str(room)]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == PrismError.exit_code, done.stderr
    assert "no room left" in done.stdout
    assert list(out.rglob("*")) == []
    with pytest.raises(InputError, match="no finished build"):
        load_manifest(out)
    build_mixture(source(file), tokenizer, out)


def test_a_disk_that_fills_up_in_the_join_keeps_the_parts(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, out = source(write_jsonl(tmp_path / "a.jsonl", ["aa", "bb"])), tmp_path / "out"

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("prism_nemo.data.join.write_index", fail)
        with pytest.raises(PrismError, match="no room left"):
            build_mixture(mixture, tokenizer, out)
    assert [file.suffix for file in out.rglob("*") if file.is_file()] == [".part"]
    monkeypatch.setattr("prism_nemo.data.tokenise.PartWriter", None)  # nothing is tokenised again
    assert texts_of(build_mixture(mixture, tokenizer, out), tokenizer) == ["aa", "bb"]


def test_a_file_that_changes_while_it_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["aa", "bb"])

    def grow(_: Any) -> None:
        with open(file, "a") as stream:
            stream.write('{"text": "cc"}\n')

    with pytest.raises(PrismError, match="a file changed while it was read"):
        build_mixture(source(file), tokenizer, tmp_path / "out", watch=grow)
    assert len(texts_of(build_mixture(source(file), tokenizer, tmp_path / "out"), tokenizer)) == 3


def test_unreadable_folder_is_a_message(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["aa"])
    with pytest.raises(PrismError, match=r"a\.jsonl/out: "):
        build_mixture(source(file), tokenizer, file / "out")
