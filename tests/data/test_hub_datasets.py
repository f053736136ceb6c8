"""Reading the Hub, with its address book replaced: a dataset of local files is streamed by `datasets` just the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_text import words, write_jsonl

from prism_nemo.data.build import Manifest, build_mixture
from prism_nemo.data.mixture import Hub, Mixture, Source
from prism_nemo.data.mixture_file import load_mixture
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError

TEXTS = [[words("abc", 6, 10 * shard + i) for i in range(5)] for shard in range(3)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(commit="c0ffee", folder=tmp_path / "dataset")
    for i, texts in enumerate(TEXTS):
        write_jsonl(state.folder / f"train-{i}.jsonl", texts)

    def info(self: Any, id: str, revision: str) -> SimpleNamespace:
        return SimpleNamespace(sha=state.commit)

    import datasets

    load = datasets.load_dataset

    def load_local(id: str, config: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        assert (id, config, split, revision, streaming) == ("org/name", None, "train", state.commit, True)
        return load(str(state.folder), split=split, streaming=True)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return state


def mixture() -> Mixture:
    return Mixture("m", [Source("s", "d", [], 1.0, hub=Hub("org/name"), filter=["text != 'no'"])])


def test_rows_of_all_files_are_streamed_in_order(hub: SimpleNamespace, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = build_mixture(mixture(), tokenizer, tmp_path / "out")
    stored = IndexedDataset(manifest.prefix("s"))
    found = [tokenizer.decode(stored[i].tolist()[:-1]) for i in range(len(stored))]
    assert found == [text for texts in TEXTS for text in texts]
    (item,) = manifest.source("s").inputs
    assert (item.path, item.sha256) == ("hub:org/name//train", "c0ffee")


def test_rows_of_the_hub_can_have_a_mask_and_a_cap(hub: SimpleNamespace, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def build(cap: int | None) -> Manifest:
        masked = Source("s", "d", [], 1.0, hub=Hub("org/name"), template="Say: {text}", loss=["text"], max_tokens=cap)
        return build_mixture(Mixture("m", [masked]), tokenizer, tmp_path / "out")

    whole = build(None).source("s")
    stored = IndexedDataset(build(None).prefix("s"))
    mask = np.fromfile(build(None).prefix("s") + ".loss", np.uint8)
    ids = np.concatenate([stored[i] for i in range(len(stored))])
    assert len(mask) == len(ids) == whole.tokens
    kept = tokenizer.decode(ids[mask == 1].tolist()).split("<eos>")[:-1]
    assert [text.lstrip() for text in kept] == [text for texts in TEXTS for text in texts]
    some = build(whole.tokens // 2).source("s")
    assert 0 < some.tokens <= whole.tokens // 2
    assert [item.sha256 for item in some.inputs] == ["c0ffee"]
    assert build(whole.tokens // 2).rebuilt == ()
    hub.commit = "decaf"
    assert build(whole.tokens // 2).rebuilt == ("s",)


def test_a_new_commit_is_built_anew_and_the_same_one_is_not(
    hub: SimpleNamespace, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert build_mixture(mixture(), tokenizer, tmp_path / "out").rebuilt == ("s",)
    assert build_mixture(mixture(), tokenizer, tmp_path / "out").rebuilt == ()
    hub.commit = "decaf"
    assert build_mixture(mixture(), tokenizer, tmp_path / "out").rebuilt == ("s",)


def test_no_network_is_a_message(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known\nmore lines")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(
        InputError, match=r"hub org/name: cannot be read \(ConnectionError: Name or service not known\)"
    ):
        build_mixture(mixture(), tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_datasets_the_advice_names_the_extra(
    hub: SimpleNamespace, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs `datasets`; run `pip install 'prism-nemo\[data\]'`"):
        build_mixture(mixture(), tokenizer, tmp_path / "out")


def test_a_stream_that_breaks_off_is_a_message(hub: SimpleNamespace, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (hub.folder / "train-1.jsonl").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(InputError, match=r"hub org/name: reading stopped"):
        build_mixture(mixture(), tokenizer, tmp_path / "out")


def test_a_mixture_file_with_a_hub(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    entry = {"name": "s", "domain": "d", "weight": 1, "hub": {"id": "org/name", "split": "train"}}
    content = {"name": "m", "retention": "none", "sources": [entry]}
    path.write_text(json.dumps(content))
    assert load_mixture(path).sources[0].hub == Hub("org/name")
    entry["hub"] = "org/name"
    path.write_text(json.dumps(content))
    assert load_mixture(path).sources[0].hub == Hub("org/name")
    entry["hub"] = {"idd": "x"}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"sources\[0\]\.hub: unknown key 'idd'; did you mean 'id'"):
        load_mixture(path)
    entry["hub"], entry["paths"] = "org/name", str(path)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="both paths and a hub"):
        load_mixture(path)
