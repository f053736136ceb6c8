from __future__ import annotations

from pathlib import Path

import pytest

from prism_nemo.data.mixture import (
    Decontaminate,
    Deduplicate,
    Hub,
    Input,
    Mixture,
    Retention,
    Source,
    check_mixture,
)
from prism_nemo.data.mixture_file import load_mixture
from prism_nemo.errors import InputError

GOOD = """
name: m
retention: {share: 0.25, sources: [general]}
sources:
  - {name: math, domain: math, paths: ["sub/*.jsonl", sub/b.jsonl], weight: 3, text_field: body}
  - {name: general, domain: general, paths: [g.txt], weight: 1, max_epochs: 2.5}
"""


def write(folder: Path, text: str = GOOD) -> Path:
    (folder / "sub").mkdir(exist_ok=True)
    for name in ("sub/b.jsonl", "sub/a.jsonl", "g.txt", "h.txt"):
        (folder / name).write_text("{}\n")
    (folder / "void.txt").write_text("")
    (folder / "data.csv").write_text("a")
    path = folder / "m.yaml"
    path.write_text(text)
    return path


def test_reads_everything_and_sorts_the_files_of_overlapping_patterns(tmp_path: Path) -> None:
    mixture = load_mixture(write(tmp_path))
    assert mixture == Mixture(
        "m",
        [
            Source("math", "math", [str(tmp_path / "sub/a.jsonl"), str(tmp_path / "sub/b.jsonl")], 3.0, "body"),
            Source("general", "general", [str(tmp_path / "g.txt")], 1.0, max_epochs=2.5),
        ],
        Retention(0.25, ["general"]),
    )
    assert mixture.shares() == {"math": 0.75, "general": 0.25}


def test_paths_are_relative_to_the_file_and_not_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_mixture(path).sources[1].paths == [str(tmp_path / "g.txt")]


def test_retention_none_must_be_said(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("{share: 0.25, sources: [general]}", "none"))
    assert load_mixture(path).retention is None


def test_a_share_that_is_met_exactly_is_met_in_floating_point_too(tmp_path: Path) -> None:
    rows = "".join(f"  - {{name: s{i}, domain: d, paths: [g.txt], weight: 0.07}}\n" for i in range(10))
    path = write(tmp_path, f"name: m\nretention: {{share: 0.1, sources: [s0]}}\nsources:\n{rows}")
    assert load_mixture(path).retention is not None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: m\n", "name: m\nsuorces: []\n", ["unknown key 'suorces'", "did you mean 'sources'"]),
        ("weight: 3", "wieght: 3", ["sources[0]", "unknown key 'wieght'", "did you mean 'weight'"]),
        ("{share:", "{shrae: 1, share:", ["retention", "did you mean 'share'"]),
        ("weight: 3", "weight: -3", ["sources[0].weight", "-3"]),
        ("weight: 3", "weight: .nan", ["sources[0].weight"]),
        ("weight: 3", "weight: heavy", ["sources[0].weight", "number"]),
        ("weight: 3", "weight: true", ["sources[0].weight", "number"]),
        (", weight: 3", "", ["sources[0].weight", "None"]),
        ("domain: math, ", "", ["sources[0].domain"]),
        ("name: m\n", "", [": name:"]),
        ("name: math", "name: general", ["sources[1].name", "used twice"]),
        ("name: math", "name: a/b", ["sources[0].name", "file name"]),
        ("g.txt", "nothere.txt", ["sources[1].paths", "'nothere.txt' matches no file"]),
        ("g.txt", '"no*.txt"', ["sources[1].paths", "'no*.txt' matches no file"]),
        ("[g.txt]", "[]", ["sources[1].paths", "lists no files"]),
        ("[g.txt]", "[sub]", ["sources[1].paths", "pattern"]),
        ("[g.txt]", "[void.txt]", ["sources[1].paths", "is empty"]),
        ("[g.txt]", "[data.csv]", ["sources[1].paths", "unknown kind", ".jsonl"]),
        ("[g.txt]", "7", ["sources[1].paths", "list"]),
        ("max_epochs: 2.5", "max_epochs: 0", ["sources[1].max_epochs"]),
        ("share: 0.25", "share: 0.26", ["retention.share", "25.00%", "26.00%"]),
        ("share: 0.25", "share: 0", ["retention.share"]),
        ("[general]}", "[genral]}", ["retention.sources", "did you mean 'general'"]),
        ("[general]}", "[]}", ["retention.sources"]),
        ("retention: {share: 0.25, sources: [general]}\n", "", ["retention: missing", "retention: none"]),
        ("{share: 0.25, sources: [general]}", "", ["retention", "the word `none`"]),
        ("sources:\n", "sources: 3\nx:\n", ["unknown key 'x'"]),
        ("weight: 3", 'weight: "${oc.env:PRISM_NOT_SET}"', ["cannot be read", "PRISM_NOT_SET"]),
        ("name: m\n", "name: [m\n", ["cannot be read as YAML"]),
    ],
)
def test_each_mistake_names_the_file_and_the_key(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_mixture(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_all_weights_zero(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("weight: 3", "weight: 0").replace("weight: 1", "weight: 0"))
    with pytest.raises(InputError, match="every weight is 0"):
        load_mixture(path)


def test_a_held_out_file_cannot_be_trained_on(tmp_path: Path) -> None:
    extra = "  - {name: held, domain: general, paths: [g.txt], weight: 0}\n"
    with pytest.raises(InputError, match=r"g\.txt is held out by 'held'.*trained on by 'general'"):
        load_mixture(write(tmp_path, GOOD + extra))
    assert load_mixture(write(tmp_path, GOOD + extra.replace("g.txt", "h.txt"))).sources[2].weight == 0


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=r"m\.yaml"):
        load_mixture(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such mixture file"):
        load_mixture(tmp_path / "none.yaml")


def test_a_mixture_made_in_python_is_checked_too() -> None:
    with pytest.raises(InputError, match=r"here: sources\[0\]\.paths"):
        check_mixture(Mixture("m", [Source("a", "d", ["/nowhere.txt"], 1.0)]), "here")


FULL = """
name: m
retention: none
deduplicate: {near: 0.7}
decontaminate: {against: [h.txt], ngram: 8}
sources:
  - name: qa
    domain: math
    weight: 1
    max_bad: 3
    max_document_bytes: 1000
    inputs:
      - {paths: [sub/a.jsonl], template: "{q}\\n{a}", filter: ["score >= 3", "judgment == 'right'"]}
      - {hub: {id: org/name, config: c, split: s, revision: v1}, turns: messages, speakers: false}
"""


def test_inputs_filters_and_rules_are_read(tmp_path: Path) -> None:
    mixture = load_mixture(write(tmp_path, FULL))
    assert mixture.deduplicate == Deduplicate(True, 0.7)
    assert mixture.decontaminate == Decontaminate([str(tmp_path / "h.txt")], 8)
    (source,) = mixture.sources
    assert (source.max_bad, source.max_document_bytes) == (3, 1000)
    assert source.all_inputs() == [
        Input([str(tmp_path / "sub/a.jsonl")], template="{q}\n{a}", filter=["score >= 3", "judgment == 'right'"]),
        Input([], Hub("org/name", "c", "s", "v1"), turns="messages", speakers=False),
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("score >= 3", "score >= open('x')", ["inputs[0].filter", "not allowed"]),
        ("score >= 3", "score >=", ["inputs[0].filter", "not an expression"]),
        ('"{q}\\n{a}"', '"{q!r}"', ["inputs[0].template", "field name"]),
        ('"{q}\\n{a}"', "no field", ["inputs[0].template", "names no field"]),
        ("turns: messages", "turns: messages, template: '{a}'", ["turns", "template", "choose one"]),
        ("turns: messages", "turns: messages, text_field: a", ["text_field", "choose one"]),
        ("turns: messages", "turn: messages", ["unknown key 'turn'", "did you mean 'turns'"]),
        ("turns: messages, ", "", ["inputs[1].speakers"]),
        ("id: org/name, ", "", ["inputs[1].hub.id: missing"]),
        ("split: s", "spilt: s", ["inputs[1].hub", "did you mean 'split'"]),
        ("sub/a.jsonl", "g.txt", ["inputs[0]", "has no fields"]),
        ("    inputs:", "    template: x\n    inputs:", ["template", "beside `inputs`"]),
        ("    inputs:", "    paths: [g.txt]\n    inputs:", ["choose one"]),
        ("max_bad: 3", "max_bad: 0.5", ["max_bad", "whole number"]),
        ("max_bad: 3", "max_bad: -1", ["max_bad"]),
        ("near: 0.7", "near: 7", ["deduplicate.near"]),
        ("{near: 0.7}", "{exact: false}", ["deduplicate", "neither"]),
        ("{near: 0.7}", "fuzzy", ["deduplicate", "exact"]),
        ("ngram: 8", "ngram: 1", ["decontaminate.ngram"]),
        ("[h.txt]", "[]", ["decontaminate.against", "names no file"]),
        ("[h.txt]", "[nothere.txt]", ["decontaminate.against", "matches no file"]),
        ("[h.txt]", "[sub/a.jsonl]", ["decontaminate.against", "read by source 'qa'"]),
    ],
)
def test_each_mistake_in_the_longer_form_names_its_key(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in FULL
    path = write(tmp_path, FULL.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_mixture(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_token_file_needs_its_index(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(b"xx")
    with pytest.raises(InputError, match=r"t\.bin has no t\.idx"):
        load_mixture(write(tmp_path, GOOD.replace("g.txt", "t.bin")))
