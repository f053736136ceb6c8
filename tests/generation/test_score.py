"""Sharing prefixes changes what is computed, never a log-probability.

The reference is a full forward of the training model over each row by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_workers import against_forward, in_layout, special_cases
from tiny_models import save_tiny

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.generation.prefix_tree import ask, build_tree, families, packed, shares, sortable
from prism_nemo.generation.score import Row, check_rows
from prism_nemo.runtime.launch import launch

FAMILIES = ("llama", "mistral-window", "granite-hybrid-one-group", "nemotron-h")
# Passes that hold everything, a question with its options, and less than a question.
LIMITS = [None, 40, 7]


def _some(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 149, count).tolist()


def _rows() -> list[Row]:
    """Few-shot questions with options of one token and of several, and whatever else may come."""
    shots = _some(0, 23)
    rows = []
    for question in range(5):
        # The first three begin alike within the question.
        asked = shots + _some(1 if question < 3 else 2, 4) + _some(10 + question, 5 + question)
        for option in range(4):
            length = 1 if question % 2 else 1 + 3 * option
            rows.append(Row(asked + _some(100 + 7 * question + option, length), len(asked)))
    # Asked again, in part, and as a whole text.
    rows += [rows[3], Row(rows[3].tokens, 2), Row(rows[3].tokens[:-2], len(shots)), Row(rows[9].tokens, 1)]
    # Of nothing known; one token and one more; as long as the model reads, and its beginning.
    rows += [Row(_some(5, 30), 29), Row(_some(6, 2), 1), Row(_some(7, 129), 3), Row(_some(7, 129)[:80], 79)]
    # Each the beginning of the next: a chain of nodes.
    rows += [Row([*_some(8, 12)[:n], n], n) for n in range(2, 12)]
    return rows


ROWS = _rows()


@pytest.fixture(scope="session")
def families_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    return {case: str(save_tiny(case, root / case)) for case in FAMILIES}


@pytest.fixture(scope="session")
def alone(families_dirs: dict[str, str]) -> dict[str, Any]:
    """See `score_workers.against_forward`."""
    found = launch(against_forward, list(families_dirs.values()), ROWS, LIMITS)
    return dict(zip(families_dirs, found, strict=True))


@pytest.mark.parametrize("case", FAMILIES)
def test_a_row_gets_what_a_full_forward_gives(case: str, alone: dict[str, Any]) -> None:
    """fp32 rounding through four layers is 1e-6 of the logits, which here reach 30.

    A wrong mask, place or state shows at 1e-1: so does the neighbouring output, looked at to know that it would.
    """
    results, reference, _ = alone[case]
    for scored in results:
        assert len(scored) == len(ROWS)
        for row, own, (wanted, greedy, shifted) in zip(ROWS, scored, reference, strict=True):
            assert len(own.logprobs) == len(row.tokens) - row.first
            assert own.logprobs == pytest.approx(wanted, abs=5e-5)
            assert own.greedy == greedy
            assert max(abs(a - b) for a, b in zip(wanted, shifted, strict=True)) > 1e-2


@pytest.mark.parametrize("case", ["llama", "nemotron-h"])
def test_what_rows_share_is_read_once(case: str, alone: dict[str, Any]) -> None:
    """Every different beginning of a row is one token of one pass, and every output one row of logits."""
    beginnings = {tuple(row.tokens[:n]) for row in ROWS for n in range(1, len(row.tokens))}
    outputs = {tuple(row.tokens[:n]) for row in ROWS for n in range(row.first, len(row.tokens))}
    assert len(beginnings) < 0.5 * sum(len(row.tokens) - 1 for row in ROWS)
    for limit, (passes, logits) in zip(LIMITS, alone[case][2], strict=True):
        assert sum(passes) == len(beginnings)
        assert logits == len(outputs)
        assert max(passes) <= (limit or 1024)


LAYOUTS = {
    "tp2": ParallelConfig(2),
    "pp2": ParallelConfig(1, 2),
    "tp2-pp2": ParallelConfig(2, 2),
}


@pytest.mark.parametrize("layout", [pytest.param(n, marks=pytest.mark.slow) if n == "tp2-pp2" else n for n in LAYOUTS])
def test_every_layout_scores_what_one_process_scores(
    layout: str, families_dirs: dict[str, str], alone: dict[str, Any]
) -> None:
    """On every rank, in passes that have to be put together. The vocabulary of 149 is padded at tensor parallel size 2,
    and the padding's logits are made ten times those of a token: in half of the places it would win.
    """
    cases = ["llama", "nemotron-h", "granite-hybrid-one-group"]
    parallel = LAYOUTS[layout]
    args = ([families_dirs[case] for case in cases], parallel, ROWS, 40)
    everyone = launch(in_layout, *args, processes=parallel.world_size)
    assert len(everyone) == parallel.world_size
    for found in everyone:
        assert found == everyone[0]
    for case, scored in zip(cases, everyone[0], strict=True):
        for own, wanted in zip(scored, alone[case][0][0], strict=True):
            assert own.logprobs == pytest.approx(wanted.logprobs, abs=5e-5)
            assert own.greedy == wanted.greedy


@pytest.fixture(scope="module")
def special(families_dirs: dict[str, str]) -> Any:
    """See `score_workers.special_cases`."""
    equal = [Row([3, 0, 0], 1), Row([3, 0, 148], 1), Row([3, 1], 1)]
    return launch(special_cases, families_dirs["granite-hybrid-one-group"], ROWS[:3], equal)


def test_greedy_means_that_every_token_is_the_first_choice(special: Any) -> None:
    assert special[0] == [(True, False)] * 3


def test_of_equally_likely_tokens_the_first_is_greedy(special: Any) -> None:
    """As argmax has it. All logits 0: each token has a probability of one in 149."""
    assert [one.greedy for one in special[1]] == [True, False, False]
    for one in special[1]:
        assert one.logprobs == pytest.approx([-np.log(149)] * len(one.logprobs), abs=1e-6)


def test_numbers_that_are_not_finite_are_said(special: Any) -> None:
    assert "row 0: the log-probabilities are not finite" in special[2]


def test_nothing_asked_is_nothing_answered(special: Any) -> None:
    assert special[3] == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row([1, 2], 0), "row 1: of 2 tokens those from 0 on"),
        (Row([1, 2], 2), "row 1: of 2 tokens those from 2 on"),
        (Row([], 1), "row 1: of 0 tokens"),
        (Row([1] * 12, 3), "11 tokens have to be read, but the model has 10"),
        (Row([1, 149], 1), "a token outside the model's vocabulary of 149"),
        (Row([-1, 1], 1), "a token outside the model's vocabulary of 149"),
    ],
)
def test_rows_that_no_model_reads_are_refused(row: Row, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_rows([Row([0, 148], 1), row], 10, 149)
    check_rows([Row([1] * 11, 10)], 10, 149)


# Small vocabularies make long shared beginnings; numbers above 255 would show a sort by the wrong byte order.
_ROWS = st.lists(st.lists(st.sampled_from([0, 1, 256, 65_536]), min_size=1, max_size=9), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(_ROWS, st.integers(1, 6))
def test_a_tree_holds_every_beginning_once(rows: list[list[int]], longest: int) -> None:
    root, ends = build_tree([sortable(row) for row in rows], longest)
    nodes = list(root.walk())[1:]
    assert sum(map(len, nodes)) == root.size == len({tuple(r[:n]) for r in rows for n in range(1, len(r) + 1)})
    assert all(1 <= len(node) <= longest for node in nodes)
    for node in [root, *nodes]:
        starts = [int(child.row[child.start]) for child in node.children]
        assert len(set(starts)) == len(starts)
        assert all(child.parent is node and child.start == node.end for child in node.children)
        assert node.size == len(node) + sum(child.size for child in node.children)
    for number, (row, end) in enumerate(zip(rows, ends, strict=True)):
        assert end.row[: end.end].tolist() == row
        ask(end, len(row) // 2, 100 * number)
    for number, row in enumerate(rows):
        asked = [(place, slot) for node in nodes for place, slot in node.targets if slot // 100 == number]
        assert sorted(asked) == [(p, 100 * number + p - len(row) // 2) for p in range(len(row) // 2, len(row))]
    together = list(families(root.children, 4))
    assert sorted(map(id, (n for group in together for n in group))) == sorted(map(id, nodes))
    for group in together:
        assert len({id(node.parent) for node in group}) == 1
        if len(group) > 1:
            assert sum(map(len, group)) <= 4
            assert not any(node.children for node in group)
    columns: dict[int, Any] = {}  # what a buffer holds: see prism_nemo.generation.passes
    for group in together:
        for node in group:
            assert [int(columns[p].row[p]) for p in range(node.start)] == node.row[: node.start].tolist()
        for node in group:
            columns.update((p, node) for p in range(node.start, node.end))


@settings(max_examples=100, deadline=None)
@given(_ROWS, st.integers(1, 5), st.integers(1, 8))
def test_work_is_shared_out_whole(rows: list[list[int]], parts: int, limit: int) -> None:
    dealt = shares([sortable(row) for row in rows], parts)
    assert len(dealt) == parts
    assert sorted(i for own in dealt for i in own) == list(range(len(rows)))
    root, _ = build_tree([sortable(row) for row in rows], 9)
    batches = list(packed(root.children, limit))
    assert [node for batch in batches for node in batch] == root.children
    assert all(sum(node.size for node in batch) <= limit or len(batch) == 1 for batch in batches)


def test_readers_get_about_as_much_as_each_other() -> None:
    """Two sets of examples with eight questions each: a reader for each, and neither reads the other's."""
    rows = [[shot] * 50 + [question] * 5 for question in range(2, 10) for shot in (0, 1)]
    first, second = shares([sortable(row) for row in rows], 2)
    assert sorted((len(first), len(second))) == [8, 8]
    assert {rows[i][0] for i in first} == {0}
    assert {rows[i][0] for i in second} == {1}
