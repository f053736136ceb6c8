from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_text import write_jsonl

from prism_nemo.data.contamination import SHORTEST, Contamination, evaluation_texts, normal_words
from prism_nemo.data.mixture import Decontaminate
from prism_nemo.errors import InputError

ITEM = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia's shop sell altogether in April and May?"
)
SETS = Contamination([("e.jsonl:1", ITEM), ("e.jsonl:2", "42"), ("e.jsonl:3", "Is Größe the word of the day?")], 13)


@pytest.mark.parametrize(
    "planted",
    [
        ITEM,
        ITEM.upper(),
        ITEM.replace(" ", "\n\t "),
        ITEM.replace(",", " --").replace(".", "!?").replace("?", ""),
        "**" + ITEM.replace(" ", " ** ") + "**",
        ITEM.replace("'", "’").replace(" ", "\u00a0"),
        ITEM.replace("'", ""),
        " ".join(f"_{word}_" for word in ITEM.split()),
        "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in ITEM),  # full-width letters
    ],
)
def test_a_planted_item_is_found_however_it_is_written(planted: str) -> None:
    found = SETS.find(f"some words before it {planted} and some behind")
    assert found is not None
    assert found.evaluation == "e.jsonl:1"
    assert found.words.startswith("natalia sold clips to 48 of her friends")


def test_twelve_shared_words_are_not_enough_and_thirteen_are() -> None:
    words = ITEM.split()
    assert SETS.find("x " + " ".join(words[3:15]) + " y") is None
    assert SETS.find("x " + " ".join(words[3:16]) + " y") is not None
    assert Contamination([("e:1", ITEM)], 12).find("x " + " ".join(words[3:15]) + " y") is not None


def test_a_short_item_is_found_as_a_whole_and_a_shorter_one_is_counted() -> None:
    assert (SETS.items, SETS.too_short) == (2, 1)
    found = SETS.find("is GRÖSSE the word, of the Day")
    assert found is not None
    assert found.evaluation == "e.jsonl:3"
    assert SETS.find("is größe the word of the night") is None
    assert SETS.find("42 " * 50) is None
    assert SHORTEST == 6


def test_it_survives_the_way_to_another_process() -> None:
    SETS.find(ITEM)
    data = pickle.dumps(SETS)
    assert len(data) < 100_000
    copy = pickle.loads(data)
    assert copy.find(ITEM) == SETS.find(ITEM)
    assert copy.fingerprint == SETS.fingerprint
    assert Contamination([("f:9", ITEM)], 13).fingerprint != SETS.fingerprint


def slow_find(text: str, items: list[str], ngram: int) -> bool:
    """The definition, written down: any shared run of words."""
    words = normal_words(text)
    for item in items:
        size = min(ngram, len(normal_words(item)))
        if size < min(SHORTEST, ngram):
            continue
        runs = {tuple(normal_words(item)[i : i + size]) for i in range(len(normal_words(item)) - size + 1)}
        if any(tuple(words[i : i + size]) in runs for i in range(len(words) - size + 1)):
            return True
    return False


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 4))
def test_the_fast_way_finds_what_the_definition_finds(seed: int, ngram: int, letters: int) -> None:
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices("abcd"[:letters] + "Z", k=rng.randint(0, most)))

    items = [text(9) for _ in range(3)]
    sets = Contamination([(str(i), item) for i, item in enumerate(items)], ngram)
    for _ in range(10):
        document = text(25)
        assert (sets.find(document) is not None) == slow_find(document, items, ngram)


def test_every_text_inside_a_record_counts_and_text_files_too(tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    file.write_text('{"q": "one", "n": 3, "choices": ["two", {"x": "three"}]}\n\n"four"\n')
    text = tmp_path / "e.txt"
    text.write_text("five")
    found = list(evaluation_texts(Decontaminate([str(file), str(text)])))
    assert found == [*((f"{file}:1", t) for t in ("one", "two", "three")), (f"{file}:3", "four"), (str(text), "five")]


def test_an_evaluation_set_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "e.jsonl", ["a"])
    file.write_text(file.read_text() + '{"half')
    with pytest.raises(InputError, match=r"e\.jsonl:2: is not JSON"):
        list(evaluation_texts(Decontaminate([str(file)])))
