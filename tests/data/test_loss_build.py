"""A build with loss masks: the same tokens as without, and beside them which of them are trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_text import words, write_jsonl

from prism_nemo.data.build import Manifest, build_mixture, load_manifest
from prism_nemo.data.mixture import Deduplicate, Input, Mixture, Source
from prism_nemo.data.mixture_file import load_mixture
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError


def mixture(*inputs: Input, **more: Any) -> Mixture:
    return Mixture("m", [Source("s", "d", [], 1.0, inputs=list(inputs))], **more)


def rows(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def masks(manifest: Manifest, name: str = "s") -> Iterator[tuple[list[int], list[int]]]:
    """The ids and the mask of each document, read as training does."""
    dataset = IndexedDataset(manifest.prefix(name))
    flat = np.memmap(manifest.prefix(name) + ".loss", np.uint8, "r")
    at = 0
    for i in range(len(dataset)):
        ids = dataset[i].tolist()
        yield ids, flat[at : at + len(ids)].tolist()
        at += len(ids)
    assert at == len(flat)


def counted(manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    """What is trained on, with `<eos>` where the end is."""
    return [
        tokenizer.decode([i for i, inside in zip(ids, mask, strict=True) if inside]) for ids, mask in masks(manifest)
    ]


@pytest.fixture
def qa(tmp_path: Path) -> str:
    return rows(
        tmp_path / "qa.jsonl",
        [
            {"q": "abc 😀 1", "a": "42 é😀", "n": 1},
            {"q": "only a question", "a": "", "n": 2},
            {"q": "abc", "a": "def", "n": 3},
        ],
    )


def test_the_answer_and_the_end_are_trained_on_and_the_tokens_are_those_without_a_mask(
    qa: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    said: list[str] = []
    manifest = build_mixture(
        mixture(Input([qa], template="{q}\n{a}", loss=["a"])), tokenizer, tmp_path / "out", progress=said.append
    )
    plain = build_mixture(mixture(Input([qa], template="{q}\n{a}")), tokenizer, tmp_path / "plain")
    for suffix in (".bin", ".idx"):
        assert Path(manifest.prefix("s") + suffix).read_bytes() == Path(plain.prefix("s") + suffix).read_bytes()
    assert counted(manifest, tokenizer) == ["42 é😀<eos>", "", "def<eos>"]
    item = manifest.source("s")
    assert item.loss_tokens == sum(sum(mask) for _, mask in masks(manifest))
    assert item.report["no_loss"] == {"count": 1, "first": f"{qa}:2"}
    assert item.documents == 3
    assert f"({item.loss_tokens} in the loss)" in said[-1]
    assert f"1 kept without a token in the loss (first: {qa}:2)" in said[-1]
    assert load_manifest(tmp_path / "out") == manifest
    # Without a mask there is neither file nor number.
    assert plain.source("s").loss_tokens is None
    assert "no_loss" not in plain.source("s").report
    assert not list((tmp_path / "plain").glob("*.loss"))


def test_roles_and_their_synonyms(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = rows(
        tmp_path / "chat.jsonl",
        [
            {"m": [{"role": "user", "content": "aa"}, {"role": "assistant", "content": "bb cc"}]},
            {"m": [{"from": "system", "value": "dd"}, {"from": "gpt", "value": "ee"}, {"from": "human", "value": "f"}]},
        ],
    )
    for name in ("assistant", "gpt"):
        out = tmp_path / name
        manifest = build_mixture(mixture(Input([file], turns="m", loss=[name])), tokenizer, out)
        # A blank after `Assistant:` is one token with what follows where the tokenizer joins them.
        assert [text.lstrip() for text in counted(manifest, tokenizer)] == ["bb cc<eos>", "ee"]
    both = mixture(Input([file], turns="m", speakers=False, loss=["human", "system"]))
    assert counted(build_mixture(both, tokenizer, tmp_path / "both"), tokenizer) == ["aa", "ddf<eos>"]


def test_inputs_without_a_mask_count_whole(qa: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = str(write_jsonl(tmp_path / "plain.jsonl", ["uvw xyz"]))
    both = mixture(Input([plain]), Input([qa], template="{q}\n{a}", loss=["a"], filter=["n == 3"]), Input([plain]))
    manifest = build_mixture(both, tokenizer, tmp_path / "out")
    assert counted(manifest, tokenizer) == ["uvw xyz<eos>", "def<eos>", "uvw xyz<eos>"]


@pytest.mark.parametrize("unit", [40, 400, 1 << 20])
def test_the_mask_stays_with_its_documents_when_repeated_ones_go(
    unit: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_nemo.data.units.UNIT_BYTES", unit)
    monkeypatch.setattr("prism_nemo.data.build._BATCH_CHARACTERS", 30)
    numbers = [i - (i % 3 == 2) for i in range(60)]
    records = [{"q": words("abc", 1 + i % 5, i), "a": words("xyz", 1 + i % 4, i)} for i in numbers]
    file = rows(tmp_path / "a.jsonl", records)
    both = mixture(Input([file], template="{q} {a}", loss=["a"]), deduplicate=Deduplicate())
    manifest = build_mixture(both, tokenizer, tmp_path / "out", workers=1)
    texts = dict.fromkeys((f"{record['q']} {record['a']}", record["a"]) for record in records)
    assert manifest.source("s").documents == len(texts) < 60
    assert [tokenizer.decode(ids[:-1]) for ids, _ in masks(manifest)] == [text for text, _ in texts]
    assert [text.lstrip() for text in counted(manifest, tokenizer)] == [f"{answer}<eos>" for _, answer in texts]


def test_no_loss_counts_what_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = rows(tmp_path / "a.jsonl", [{"q": "aa", "a": "b"}, {"q": "cc", "a": ""}, {"q": "cc", "a": ""}])
    both = mixture(Input([file], template="{q}{a}", loss=["a"]), deduplicate=Deduplicate())
    assert build_mixture(both, tokenizer, tmp_path / "out").source("s").report["no_loss"]["count"] == 1
    with pytest.raises(InputError, match=r"no token of its 1 documents is in the loss.*a\.jsonl:2"):
        build_mixture(
            mixture(Input([rows(tmp_path / "a.jsonl", [{"q": "", "a": ""}, {"q": "c", "a": ""}])], template="{q}{a}",
                          loss=["a"])), tokenizer, tmp_path / "none",
        )  # fmt: skip
    assert list((tmp_path / "none").glob("s-*")) == []


def test_a_changed_mask_is_a_changed_source_and_its_old_files_go(qa: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out, item = tmp_path / "out", Input([qa], template="{q}\n{a}", loss=["a"])
    first = build_mixture(mixture(item), tokenizer, out)
    assert build_mixture(mixture(item), tokenizer, out).rebuilt == ()
    item.loss = ["q", "a"]
    second = build_mixture(mixture(item), tokenizer, out)
    assert second.rebuilt == ("s",)
    assert second.source("s").loss_tokens > first.source("s").loss_tokens  # type: ignore[operator]
    assert [file.name for file in out.glob("*.loss")] == [second.source("s").prefix + ".loss"]
    item.loss = None
    assert build_mixture(mixture(item), tokenizer, out).rebuilt == ("s",)
    assert list(out.glob("*.loss")) == []


@pytest.mark.parametrize("damage", ["gone", "short", "long"])
def test_a_damaged_mask_is_found_and_made_again(damage: str, qa: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    both, out = mixture(Input([qa], template="{q}\n{a}", loss=["a"])), tmp_path / "out"
    file = Path(build_mixture(both, tokenizer, out).prefix("s") + ".loss")
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "short" else data + b"\1")
    with pytest.raises(InputError, match=r"\.loss (is missing|has \d+ bytes instead of \d+)"):
        load_manifest(out)
    assert build_mixture(both, tokenizer, out).rebuilt == ("s",)
    assert file.read_bytes() == data


def test_builds_of_before_there_were_masks_stay_valid(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The fingerprint of a source that asks for none of this is made of what it was made of in format 2."""
    file = write_jsonl(tmp_path / "a.jsonl", ["aa bb"])
    out, both = tmp_path / "out", Mixture("m", [Source("s", "d", [str(file)], 1.0)])
    manifest = build_mixture(both, tokenizer, out)
    form = {"paths": ["jsonl"], "hub": None, "text_field": "text", "template": None, "turns": None, "speakers": True}
    content = [
        2,
        [hashlib.sha256(file.read_bytes()).hexdigest()],
        [{**form, "filter": []}],
        64 << 20,
        [tokenizer.sha256, tokenizer.eos_id],
        None,
        None,
    ]
    assert manifest.source("s").fingerprint == hashlib.sha256(json.dumps(content).encode()).hexdigest()
    # What format 2 wrote: no mention of masks or limits.
    for path in (out / "manifest.json", out / f"{manifest.source('s').prefix}.json"):
        record = json.loads(path.read_text())
        for item in record.get("sources", [record]):
            del item["loss_tokens"], item["max_tokens"]
        record["format"] = 2
        if "sources" not in record:
            del record["format"]
        path.write_text(json.dumps(record))
    assert load_manifest(out).source("s").loss_tokens is None
    assert build_mixture(both, tokenizer, out).rebuilt == ()


BAD = [
    ("template: '{question} {answer}', loss: [anwser]", "'anwser' is no field of the template; did you mean 'answer'?"),
    ("template: '{question} {answer}', loss: [zzz]", "known: question, answer"),
    ("turns: m, loss: [asistant]", "'asistant' is no role; did you mean 'assistant'?"),
    ("loss: [text]", "there is neither"),
    ("text_field: text, loss: [text]", "there is neither"),
    ("turns: m, loss: []", "is empty, so nothing would be trained on"),
    ("turns: m, loss: [3]", "loss: must be text"),
    ("turns: m, loss: {assistant: true}", "loss: must be text"),
]


@pytest.mark.parametrize("where", ["paths: [a.jsonl]", "hub: org/name"])
@pytest.mark.parametrize(("form", "message"), BAD)
def test_what_a_mask_cannot_be(form: str, message: str, where: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["aa"])
    path = tmp_path / "m.yaml"
    for entry, key in (
        (f"{where}, {form}", "sources[0].loss"),
        (f"inputs: [{{{where}, {form}}}]", "sources[0].inputs[0].loss"),
    ):
        path.write_text(f"name: m\nretention: none\nsources:\n  - {{name: s, domain: d, weight: 1, {entry}}}\n")
        with pytest.raises(InputError) as caught:
            load_mixture(path)
        assert message in str(caught.value)
        assert key in str(caught.value)


def test_text_and_tokens_have_no_fields_to_mask(tmp_path: Path) -> None:
    for name in ("a.txt", "a.bin", "a.idx"):
        (tmp_path / name).write_text("x")
    path = tmp_path / "m.yaml"
    for name in ("a.txt", "a.bin"):
        for form, message in (("loss: [text]", "there is neither"), ("turns: m, loss: [user]", "has no fields")):
            path.write_text(
                f"name: m\nretention: none\nsources:\n  - {{name: s, domain: d, weight: 1, paths: [{name}], {form}}}\n"
            )
            with pytest.raises(InputError, match=message):
                load_mixture(path)


def test_a_mask_stands_in_the_inputs_or_beside_paths(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["aa"])
    path = tmp_path / "m.yaml"
    head = "name: m\nretention: none\nsources:\n  - {name: s, domain: d, weight: 1, "
    path.write_text(head + "paths: [a.jsonl], template: '{text}', loss: text}\n")
    (source,) = load_mixture(path).sources
    assert source.loss == source.all_inputs()[0].loss == ["text"]
    path.write_text(head + "loss: [user], inputs: [{paths: [a.jsonl], turns: m}]}\n")
    with pytest.raises(InputError, match=r"sources\[0\]\.loss: stands beside `inputs`"):
        load_mixture(path)
