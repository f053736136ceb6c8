from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from prism_nemo.data.corpora import SPECIAL_TOKENS, write_general_corpus
from prism_nemo.errors import InputError


def read(path: Path) -> dict[str, str]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return {record["id"]: record["text"] for record in records}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, str]]:
    train, held_out = write_general_corpus(tmp_path_factory.mktemp("corpus"))
    return read(train), read(held_out)


def test_it_is_large_and_one_file_in_twenty_is_held_out(corpus: tuple[dict[str, str], dict[str, str]]) -> None:
    train, held_out = corpus
    assert sum(map(len, train.values())) > 3_000_000
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.10
    assert not set(train) & set(held_out)


def test_documents_are_library_sources_with_tabs(corpus: tuple[dict[str, str], dict[str, str]]) -> None:
    for name, text in list(corpus[0].items())[:20]:
        assert text.replace("\t", "    ") == (Path(sysconfig.get_paths()["stdlib"]) / name).read_text("utf-8").replace(
            "\t", "    "
        )
    everything = {**corpus[0], **corpus[1]}
    assert not any("    " in text for text in everything.values())
    skipped = {"site-packages", "test", "lib2to3", "encodings", "idlelib"}
    assert not [name for name in everything if skipped.intersection(name.split("/"))]
    assert not [name for name, text in everything.items() if any(token in text for token in SPECIAL_TOKENS)]


def test_a_document_with_a_special_token_is_left_out(tmp_path: Path) -> None:
    names = {name for side in write_general_corpus(tmp_path / "a") for name in read(side)}
    less = {
        name for side in write_general_corpus(tmp_path / "b", special_tokens=["import re\n"]) for name in read(side)
    }
    assert less < names


def test_same_bytes_again_and_a_limit_keeps_the_split(
    corpus: tuple[dict[str, str], dict[str, str]], tmp_path: Path
) -> None:
    first = [p.read_bytes() for p in write_general_corpus(tmp_path / "a", 300_000)]
    again = [p.read_bytes() for p in write_general_corpus(tmp_path / "b", 300_000)]
    assert first == again
    for side, whole in zip(("general.jsonl", "general-heldout.jsonl"), corpus, strict=True):
        small = read(tmp_path / "a" / side)
        assert set(small) <= set(whole)
        assert 200_000 < sum(map(len, small.values())) <= 300_000


def test_a_limit_without_room(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_chars: 5 gives 0 training"):
        write_general_corpus(tmp_path, 5)
