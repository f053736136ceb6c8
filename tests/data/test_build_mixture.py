from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_text import write_jsonl

from prism_nemo.data.build import Manifest, build_mixture, describe, load_manifest
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError

Make = Callable[[], Mixture]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.iterdir())}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in snapshot(folder).items()}


def stored(manifest: Manifest, name: str) -> list[list[int]]:
    dataset = IndexedDataset(manifest.prefix(name))
    return [dataset[i].tolist() for i in range(len(dataset))]


def one_source(*paths: Path, **more: str) -> Mixture:
    return Mixture("m", [Source("s", "d", [str(path) for path in paths], 1.0, **more)])


def test_documents_are_stored_as_they_encode_each_with_one_end_token(
    small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    manifest = build_mixture(small_mixture(), tokenizer, tmp_path / "out")
    assert stored(manifest, "one") == [[*tokenizer.encode(t), tokenizer.eos_id] for t in ("aa bb", "cc 12 dd")]
    assert stored(manifest, "two") == [[*tokenizer.encode("x = 1\n"), tokenizer.eos_id]]
    dataset = IndexedDataset(manifest.prefix("one"))
    assert dataset.document_indices.tolist() == [0, 1, 2]
    assert dataset.index.dtype is np.uint16
    one = manifest.source("one")
    assert (one.documents, one.characters) == (2, 13)
    assert one.tokens == int(dataset.sequence_lengths.sum())


def test_the_manifest_says_where_everything_came_from(
    small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import hashlib

    manifest = build_mixture(small_mixture(), tokenizer, tmp_path / "out")
    assert load_manifest(tmp_path / "out") == manifest
    content = json.loads((tmp_path / "out/manifest.json").read_text())
    file = tmp_path / "text/one.jsonl"
    assert content["sources"][0]["inputs"] == [
        {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
    ]
    assert (content["sources"][0]["weight"], content["sources"][0]["domain"]) == (3.0, "d1")
    assert content["tokenizer"]["sha256"] == tokenizer.sha256
    assert set(content["versions"]) == {"prism_nemo", "megatron-core", "tokenizers"}
    assert content["retention"] is None


def test_jsonl_gzip_text_and_code_give_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "def f():\r\n\treturn '\u2028 é'\n"
    plain = write_jsonl(tmp_path / "a.jsonl", [text])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("a.txt", "a.py"):
        (tmp_path / name).write_bytes(text.encode())
    rows = [
        stored(build_mixture(one_source(tmp_path / name), tokenizer, tmp_path / f"out-{name}"), "s")
        for name in ("a.jsonl", "a.jsonl.gz", "a.txt", "a.py")
    ]
    assert rows == [[[*tokenizer.encode(text), tokenizer.eos_id]]] * 4


def test_files_are_read_in_order_across_batches(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"doc {i} abc" for i in range(25)]
    one, two = (
        write_jsonl(tmp_path / "1.jsonl", texts[:12], "body"),
        write_jsonl(tmp_path / "2.jsonl", texts[12:], "body"),
    )
    monkeypatch.setattr("prism_nemo.data.build._BATCH_CHARACTERS", 30)
    manifest = build_mixture(one_source(one, two, text_field="body"), tokenizer, tmp_path / "out")
    assert [tokenizer.decode(ids[:-1]) for ids in stored(manifest, "s")] == texts


def test_two_builds_give_the_same_bytes(small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    build_mixture(small_mixture(), tokenizer, tmp_path / "a")
    build_mixture(small_mixture(), tokenizer, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_second_run_writes_nothing_and_says_so(small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", []
    first = build_mixture(small_mixture(), tokenizer, out)
    before = snapshot(out)
    second = build_mixture(small_mixture(), tokenizer, out, progress=lines.append)
    assert snapshot(out) == before
    assert first.rebuilt == ("one", "two")
    assert second.rebuilt == ()
    assert second == first
    assert "nothing to do" in lines[-1]


def test_only_a_changed_source_is_rebuilt_and_its_old_tokens_go(
    small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build_mixture(small_mixture(), tokenizer, out)
    before = snapshot(out)
    (tmp_path / "text/two.txt").write_text("y = 22\n")
    manifest = build_mixture(small_mixture(), tokenizer, out)
    assert manifest.rebuilt == ("two",)
    assert stored(manifest, "two") == [[*tokenizer.encode("y = 22\n"), tokenizer.eos_id]]
    after = snapshot(out)
    assert {n: v for n, v in after.items() if n.startswith("one")} == {
        n: v for n, v in before.items() if n.startswith("one")
    }
    assert len(after) == len(before) == 7


def test_a_new_weight_changes_the_manifest_and_no_tokens(
    small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build_mixture(small_mixture(), tokenizer, out)
    mixture = small_mixture()
    mixture.sources[0].weight = 9.0
    assert build_mixture(mixture, tokenizer, out).rebuilt == ()
    assert load_manifest(out).source("one").weight == 9.0


@pytest.mark.parametrize("change", ["text_field", "tokenizer", "token file cut", "token file gone"])
def test_what_decides_the_tokens_causes_a_rebuild(
    change: str, small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mixture = small_mixture()
    file = tmp_path / "text/one.jsonl"
    file.write_text('{"text": "aa", "other": "bbbb"}\n')
    bin_file = Path(build_mixture(mixture, tokenizer, out).prefix("one") + ".bin")
    expected: tuple[str, ...] = ("one",)
    if change == "text_field":
        mixture.sources[0].text_field = "other"
    elif change == "tokenizer":
        tokenizer = Tokenizer(tokenizer._inner, tokenizer.path, "0" * 64, tokenizer.eos_id, tokenizer.pad_id)
        expected = ("one", "two")
    elif change == "token file cut":
        bin_file.write_bytes(bin_file.read_bytes()[:-1])
    else:
        bin_file.unlink()
    assert build_mixture(mixture, tokenizer, out).rebuilt == expected


@pytest.mark.parametrize("step", range(7))
def test_a_build_that_dies_at_any_rename_continues_to_the_same_bytes(
    step: int, small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_mixture(small_mixture(), tokenizer, tmp_path / "whole")
    out, calls, rename = tmp_path / "out", [], os.replace

    def die(*args: object) -> None:
        calls.append(args)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        rename(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            build_mixture(small_mixture(), tokenizer, out)
    with pytest.raises(InputError, match="no finished build"):
        load_manifest(out)
    manifest = build_mixture(small_mixture(), tokenizer, out)
    assert manifest.rebuilt == (("one", "two"), ("two",), ())[min(step // 3, 2)]
    assert contents(out) == contents(tmp_path / "whole")


def test_a_failing_rebuild_leaves_the_finished_build_usable(
    small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build_mixture(small_mixture(), tokenizer, out)
    before = contents(out)
    (tmp_path / "text/one.jsonl").write_text('{"text": "new"}\n{"text": \n')
    with pytest.raises(InputError):
        build_mixture(small_mixture(), tokenizer, out)
    assert contents(out) == before
    load_manifest(out)


def test_a_leftover_of_a_killed_build_is_ignored_and_removed(
    small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    build_mixture(small_mixture(), tokenizer, tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    prefix = Path(load_manifest(tmp_path / "whole").prefix("one")).name
    (out / f".tmp-{prefix}.bin").write_bytes(b"half")
    (out / ".tmp-of-an-older-text-0123456789ab.bin").write_bytes(b"half")
    (out / f"{prefix}.bin").write_bytes(b"renamed, but its index was not")
    build_mixture(small_mixture(), tokenizer, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_files_of_others_in_the_folder_stay(small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.json").write_text("{}")
    (out / "README").write_text("mine")
    build_mixture(small_mixture(), tokenizer, out)
    assert (out / "notes.json").exists()
    assert (out / "README").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x"}', "has no field 'text'; its fields: body"),
        (b"{", "is not JSON"),
        (b'["text"]', "must be an object"),
        (b'{"text": 3}', "must be text, found int"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(
    line: bytes, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(InputError) as caught:
        build_mixture(one_source(file), tokenizer, tmp_path / "out")
    assert f"{file}:3" in str(caught.value)
    assert message in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_gzip_bad_text_and_sources_without_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cut = tmp_path / "a.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-12])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: the gzip stream is damaged"):
        build_mixture(one_source(cut), tokenizer, tmp_path / "out")
    latin = tmp_path / "a.txt"
    latin.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"a\.txt: is not UTF-8"):
        build_mixture(one_source(latin), tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="no tokens"):
        build_mixture(one_source(write_jsonl(tmp_path / "e.jsonl", ["", ""])), tokenizer, tmp_path / "out")


def test_a_build_folder_that_is_not_one(small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished build"):
        load_manifest(tmp_path)
    out = tmp_path / "out"
    manifest = build_mixture(small_mixture(), tokenizer, out)
    with pytest.raises(InputError, match="did you mean 'one'"):
        manifest.source("onee")
    (out / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="format 99"):
        load_manifest(out)
    (out / "manifest.json").write_text('{"form')
    with pytest.raises(InputError, match="is damaged"):
        load_manifest(out)
    build_mixture(small_mixture(), tokenizer, out)
    Path(manifest.prefix("one") + ".idx").unlink()
    with pytest.raises(InputError, match=r"\.idx is missing"):
        load_manifest(out)


def test_a_moved_build_folder_still_loads(small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    build_mixture(small_mixture(), tokenizer, tmp_path / "out").prefix("one")
    os.rename(tmp_path / "out", tmp_path / "moved")
    manifest = load_manifest(tmp_path / "moved")
    assert len(IndexedDataset(manifest.prefix("one"))) == 2


def test_describe_gives_shares_and_epochs(small_mixture: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    mixture = small_mixture()
    mixture.sources[0].max_epochs = 2.0
    manifest = build_mixture(mixture, tokenizer, tmp_path / "out")
    tokens = manifest.source("one").tokens
    one, two = describe(manifest, 4 * tokens)
    assert (one.share, one.train_tokens, one.epochs, one.over_limit) == (0.75, 3 * tokens, 3.0, True)
    assert two.epochs == pytest.approx(tokens / manifest.source("two").tokens)
    assert not two.over_limit
    (only,) = describe(manifest, tokens, include=["two"])
    assert only.share == 1.0
    with pytest.raises(InputError, match="sum to 0"):
        describe(manifest, 1, include=[])
