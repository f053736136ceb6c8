from __future__ import annotations

from small_text import words

from prism_nemo.data.duplicates import PERMUTATIONS, Seen, digest, signatures
from prism_nemo.data.mixture import Deduplicate


def add(seen: Seen, text: str, source: str = "s") -> tuple[str, str] | None:
    return seen.add(digest(text), signatures([text])[0], source)


def jaccard(a: str, b: str) -> float:
    def shingles(text: str) -> set[str]:
        w = text.split()
        return {" ".join(w[i : i + 5]) for i in range(len(w) - 4)}

    one, two = shingles(a), shingles(b)
    return len(one & two) / len(one | two)


def test_the_first_stays_and_names_its_source() -> None:
    seen = Seen(Deduplicate())
    assert add(seen, "aa", "one") is None
    assert add(seen, "aa ", "two") is None
    assert add(seen, "aa", "two") == ("exact", "one")


def test_near_duplicates_are_found_above_the_threshold_and_not_below() -> None:
    found_above = found_below = 0
    for i in range(50):
        text = words("abcdefgh", 200, i)
        parts = text.split()
        similar = " ".join([*parts[:195], *words("xyz", 5, i).split()])
        different = " ".join([*parts[:120], *words("xyz", 80, i).split()])
        assert jaccard(text, similar) > 0.9
        assert jaccard(text, different) < 0.5
        seen = Seen(Deduplicate(True, 0.8))
        assert add(seen, text) is None
        found_above += add(seen, similar) == ("near", "s")
        found_below += add(seen, different) is not None
    assert found_above >= 49
    assert found_below == 0


def test_case_white_space_and_punctuation_make_a_near_duplicate_not_an_exact_one() -> None:
    text = words("abcdefgh", 50, 1)
    seen = Seen(Deduplicate(True, 0.8))
    assert add(seen, text) is None
    assert add(seen, text.upper().replace(" ", ",\n")) == ("near", "s")


def test_texts_without_words_are_not_all_alike() -> None:
    seen = Seen(Deduplicate(True, 0.8))
    assert add(seen, "+++") is None
    assert add(seen, "---") is None
    assert add(seen, "---") == ("exact", "s")


def test_signatures_do_not_depend_on_the_process() -> None:
    # Stored signatures of one build are compared with those of a later one.
    row = signatures(["the quick brown fox jumps over the lazy dog"])[0]
    assert len(row) == PERMUTATIONS
    assert row[:3].tolist() == FIRST


FIRST = [3416961315, 3346357008, 3274915766]
