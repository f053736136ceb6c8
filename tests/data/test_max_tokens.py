"""A cap on a source: the first documents that fit, whatever the workers and shards, and no more is read than that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_text import words, write_jsonl

from prism_nemo.data import fingerprint, tokenise, units
from prism_nemo.data.build import BuildProgress, Manifest, build_mixture, build_shard, load_manifest
from prism_nemo.data.mixture import Deduplicate, Input, Mixture, Source
from prism_nemo.data.mixture_file import load_mixture
from prism_nemo.data.part import Part
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError

CAP = 2000


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)


@pytest.fixture
def web(tmp_path: Path) -> list[str]:
    """Twenty files of some 1,000 tokens each, every fourth document the same as one before."""
    folder = tmp_path / "web"
    texts = [words("abcdef", 20, i - (i % 4 == 3)) for i in range(400)]
    return [str(write_jsonl(folder / f"{i:02}.jsonl", texts[20 * i : 20 * (i + 1)])) for i in range(20)]


def capped(paths: list[str], cap: int | None = CAP, **more: Any) -> Mixture:
    return Mixture("m", [Source("web", "d", paths, 1.0, max_tokens=cap)], **more)


def documents(folder: Path, name: str = "web") -> list[list[int]]:
    dataset = IndexedDataset(load_manifest(folder).prefix(name))
    return [dataset[i].tolist() for i in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("deduplicate", [None, Deduplicate()])
@pytest.mark.parametrize("cap", [200, CAP, 2500])
def test_the_first_documents_that_fit(
    cap: int, deduplicate: Deduplicate | None, web: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    build_mixture(capped(web, None, deduplicate=deduplicate), tokenizer, tmp_path / "whole")
    build_mixture(capped(web, cap, deduplicate=deduplicate), tokenizer, tmp_path / "out")
    whole, some = documents(tmp_path / "whole"), documents(tmp_path / "out")
    assert some == whole[: len(some)]
    assert sum(map(len, some)) <= cap < sum(map(len, whole[: len(some) + 1]))
    item = load_manifest(tmp_path / "out").source("web")
    assert (item.max_tokens, item.tokens) == (cap, sum(map(len, some)))
    assert item.report["over_max_tokens"] >= 1


def test_what_comes_after_is_neither_read_nor_listed(
    web: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    for module, name in ((fingerprint, "file_sha256"), (tokenise, "unit_digest")):
        inner = getattr(module, name)

        def look(what: Any, inner: Any = inner) -> Any:
            opened.append(str(what.files[0] if isinstance(what, units.Unit) else what))
            return inner(what)

        monkeypatch.setattr(module, name, look)
    Path(web[-1]).write_text("{")  # nobody finds out
    said: list[str] = []
    manifest = build_mixture(capped(web), tokenizer, tmp_path / "out", progress=said.append)
    read = [item.path for item in manifest.source("web").inputs]
    assert read == web[: len(read)]
    assert 1 <= len(read) < 6
    assert set(opened) == set(read)
    assert "all that follows because max_tokens was reached" in said[-1]
    # A later file may change, or more of them come, and nothing is to be done.
    Path(web[-2]).write_text("something else")
    more = [*web, str(write_jsonl(tmp_path / "web/zz.jsonl", ["aa"]))]
    assert build_mixture(capped(more), tokenizer, tmp_path / "out").rebuilt == ()
    # One that was read may not, nor may one come before it.
    write_jsonl(Path(web[0]), [words("abcdef", 20, 999)])
    assert build_mixture(capped(more), tokenizer, tmp_path / "out").rebuilt == ("web",)
    first = str(write_jsonl(tmp_path / "web/0.jsonl", ["aa"]))
    assert build_mixture(capped([first, *more]), tokenizer, tmp_path / "out").rebuilt == ("web",)
    assert build_mixture(capped([first, *more], CAP - 100), tokenizer, tmp_path / "out").rebuilt == ("web",)
    assert len(list((tmp_path / "out").glob("*.bin"))) == 1


@pytest.mark.parametrize("deduplicate", [None, Deduplicate()])
def test_the_same_bytes_with_any_number_of_workers_and_shards(
    deduplicate: Deduplicate | None, web: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    Path(web[12]).write_text("{")  # workers that run ahead come upon it; the error is not one of this build
    more = str(write_jsonl(tmp_path / "more.jsonl", [words("abcdef", 20, i) for i in range(0, 400, 3)]))
    both = Mixture(
        "m",
        [Source("web", "d", web, 1.0, max_tokens=CAP), Source("more", "d", [more], 1.0)],
        deduplicate=deduplicate,
    )
    build_mixture(both, tokenizer, tmp_path / "one", keep_parts=True)
    build_mixture(both, tokenizer, tmp_path / "four", keep_parts=True, workers=4)
    one = contents(tmp_path / "one")
    assert any(name.startswith("parts") for name in one)
    assert contents(tmp_path / "four") == one
    for i in range(3):
        build_shard(both, tokenizer, tmp_path / "sharded", (i, 3))
    parts = [Part(file) for file in (tmp_path / "sharded/parts").glob("web-*.part")]
    assert CAP / 2 < sum(part.tokens for part in parts) < 2 * CAP + 3 * 1000
    build_mixture(both, tokenizer, tmp_path / "sharded", keep_parts=True)
    assert contents(tmp_path / "sharded") == one
    if deduplicate is not None:
        # What lies beyond the cap is not there, so a later source keeps its copy of it.
        ids = [tuple(row) for name in ("web", "more") for row in documents(tmp_path / "one", name)]
        assert len(ids) == len(set(ids))
        wanted = {(*tokenizer.encode(words("abcdef", 20, i)), tokenizer.eos_id) for i in range(0, 400, 3)}
        assert wanted <= set(ids)


def test_a_build_that_dies_continues_and_another_cap_takes_the_parts(
    web: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_mixture(capped(web), tokenizer, tmp_path / "whole")
    calls: list[BuildProgress] = []

    def die(state: BuildProgress) -> None:
        calls.append(state)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_mixture(capped(web), tokenizer, tmp_path / "out", watch=die)
    made: list[Path] = []
    finish = tokenise.PartWriter.finish

    def count(self: Any, report: dict[str, Any]) -> None:
        made.append(self.path)
        finish(self, report)

    monkeypatch.setattr(tokenise.PartWriter, "finish", count)
    build_mixture(capped(web), tokenizer, tmp_path / "out")
    again = len(made)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    made.clear()
    build_mixture(capped(web), tokenizer, tmp_path / "kept", keep_parts=True)
    assert len(made) == again + 2
    made.clear()
    build_mixture(capped(web, CAP // 2), tokenizer, tmp_path / "kept", keep_parts=True)
    assert made == []


def test_a_cap_that_is_not_reached_takes_all(web: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    states: list[BuildProgress] = []
    manifest = build_mixture(capped(web[:2], 10**9), tokenizer, tmp_path / "out", watch=states.append)
    build_mixture(capped(web[:2], None), tokenizer, tmp_path / "whole")
    assert documents(tmp_path / "out") == documents(tmp_path / "whole")
    assert manifest.source("web").report["over_max_tokens"] == 0
    assert build_mixture(capped(web[:2], 10**9), tokenizer, tmp_path / "out").rebuilt == ()
    # There was room for more, so a new file is read.
    assert build_mixture(capped(web[:3], 10**9), tokenizer, tmp_path / "out").rebuilt == ("web",)
    # And of fewer files the build is not what it was.
    shutil.copytree(tmp_path / "out", tmp_path / "fewer")
    assert build_mixture(capped(web[:2], 10**9), tokenizer, tmp_path / "fewer").rebuilt == ("web",)


def test_exactly_as_much_as_there_is(web: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    total = build_mixture(capped(web[:1], None), tokenizer, tmp_path / "whole").source("web")
    item = build_mixture(capped(web[:1], total.tokens), tokenizer, tmp_path / "out").source("web")
    assert (item.tokens, item.report["over_max_tokens"]) == (total.tokens, 0)
    item = build_mixture(capped(web[:1], total.tokens - 1), tokenizer, tmp_path / "out").source("web")
    assert (item.documents, item.report["over_max_tokens"]) == (total.documents - 1, 1)


def test_the_time_left_follows_the_cap_and_not_the_corpus(web: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    states: list[BuildProgress] = []
    build_mixture(capped(web), tokenizer, tmp_path / "out", watch=states.append)
    corpus = sum(Path(name).stat().st_size for name in web)
    # The cap is about a tenth of the corpus.
    assert all(state.bytes_total < corpus / 5 for state in states)
    assert all(state.bytes_done <= state.bytes_total for state in states)


def test_with_deduplication_a_capped_source_decides_on_those_after_it(
    web: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    more = str(write_jsonl(tmp_path / "more.jsonl", [words("abcdef", 20, i) for i in range(30)]))

    def build(cap: int) -> Manifest:
        sources = [Source("web", "d", web, 1.0, max_tokens=cap), Source("more", "d", [more], 1.0)]
        return build_mixture(Mixture("m", sources, deduplicate=Deduplicate()), tokenizer, tmp_path / "out")

    first = build(CAP)
    assert first.rebuilt == ("web", "more")
    assert build(CAP).rebuilt == ()
    # Three documents less in `web`, of the same files: names of their own, and `more` keeps its copies.
    second = build(CAP - 150)
    assert second.rebuilt == ("web", "more")
    assert [item.path for item in second.source("web").inputs] == [item.path for item in first.source("web").inputs]
    assert second.source("web").prefix != first.source("web").prefix
    gone = first.source("web").documents - second.source("web").documents
    assert gone > 0
    assert first.source("more").documents <= second.source("more").documents
    (tmp_path / f"out/{second.source('web').prefix}.bin").unlink()
    third = build(CAP - 150)
    assert "web" in third.rebuilt
    assert third.sources == second.sources


def test_with_a_mask_and_several_inputs(web: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    qa = tmp_path / "qa.jsonl"
    qa.write_text("".join(json.dumps({"q": words("abc", 5, i), "a": "xyz"}) + "\n" for i in range(400)))
    both = capped([])
    both.sources[0].inputs = [Input(web[:1]), Input([str(qa)], template="{q}\n{a}", loss=["a"]), Input(web[1:])]
    for workers in (1, 3):
        item = build_mixture(both, tokenizer, tmp_path / str(workers), workers=workers).source("web")
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert [Path(file.path).name for file in item.inputs] == ["00.jsonl", "qa.jsonl"]
    mask = np.fromfile(load_manifest(tmp_path / "1").prefix("web") + ".loss", np.uint8)
    assert (len(mask), int(mask.sum())) == (item.tokens, item.loss_tokens)
    assert build_mixture(both, tokenizer, tmp_path / "1").rebuilt == ()


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "true", "many", ".inf", ".nan", "[3]"])
def test_what_a_cap_cannot_be(value: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["aa"])
    path = tmp_path / "m.yaml"
    entry = f"{{name: s, domain: d, weight: 1, paths: [a.jsonl], max_tokens: {value}}}"
    path.write_text(f"name: m\nretention: none\nsources:\n  - {entry}\n")
    with pytest.raises(InputError, match=r"sources\[0\]\.max_tokens: .*must be (positive|a whole number)"):
        load_mixture(path)


def test_a_cap_is_written_as_numbers_of_tokens_are(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["aa"])
    path = tmp_path / "m.yaml"
    for text, value in (("2e9", 2_000_000_000), ("1.5e3", 1500), ("700", 700)):
        entry = f"{{name: s, domain: d, weight: 1, paths: [a.jsonl], max_tokens: {text}}}"
        path.write_text(f"name: m\nretention: none\nsources:\n  - {entry}\n")
        assert load_mixture(path).sources[0].max_tokens == value


def test_a_cap_below_the_first_document(web: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"first document has more tokens than max_tokens allows \(3\)"):
        build_mixture(capped(web, 3), tokenizer, tmp_path / "out")
