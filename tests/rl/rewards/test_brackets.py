"""Where brackets close, and that no text makes the search for it long."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from prism_nemo.rl.rewards.brackets import closes_at_end, closings, deepest, split
from prism_nemo.rl.rewards.final_answer import statements


def closing(text: str, start: int) -> int | None:
    """One brace at a time, from where it opens."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
        i += 1
    return None


@given(st.text("{}\\ax", max_size=40))
def test_each_brace_closes_where_a_search_from_it_finds(text: str) -> None:
    found = closings(text)
    escaped, i = set(), 0
    while i < len(text):
        if text[i] == "\\":
            escaped.add(i + 1)
            i += 1
        i += 1
    opened = [i for i, char in enumerate(text) if char == "{" and i not in escaped]
    assert found == {i: end for i in opened if (end := closing(text, i)) is not None}


def test_a_hundred_thousand_characters_of_open_boxes() -> None:
    """In one pass; a search from each box would take 7 * 10^8 steps, which are minutes."""
    began = time.process_time()
    assert closings("\\boxed{" * 15_000) == {}
    deep = "\\boxed{" * 15_000 + "7" + "}" * 14_999
    assert len(closings(deep)) == 14_999
    assert deepest(deep) == 15_000
    assert statements(deep) is not None
    assert [s.text for s in statements("\\boxed{" * 15_000 + "\\boxed{7}")] == ["7"]
    assert time.process_time() - began < 5


def test_pieces_between_separators_outside_of_brackets() -> None:
    assert split("1, (2, 3), [4, 5), 6", ",") == ["1", "(2, 3)", "[4, 5)", "6"]
    assert split("", ",") == [""]
    assert closes_at_end("(1)(2)") is False
    assert closes_at_end("((1)(2))") is True
    assert closes_at_end("(1") is False
