from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_nemo.data.batches import BatchIterator
from prism_nemo.errors import InputError


class Numbered:
    """Sample i holds i."""

    def rows(self, first: int, count: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.arange(first, first + count)}


def iterator(mbs: int, rank: int, dp: int, gbs: int, consumed: int = 0) -> BatchIterator:
    return BatchIterator(
        Numbered(),
        micro_batch_size=mbs,
        data_parallel_rank=rank,
        data_parallel_size=dp,
        global_batch_size=gbs,
        consumed_samples=consumed,
    )


def step_rows(it: BatchIterator) -> list[int]:
    batches = [next(it)["tokens"].tolist() for _ in range(it.micro_batches_per_step)]
    assert {len(rows) for rows in batches} == {len(batches[0])}
    return [row for rows in batches for row in rows]


layouts = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # mbs, dp, micro-batches per rank


@given(layout=layouts, steps=st.integers(1, 4), start=st.integers(0, 50))
def test_the_ranks_of_a_step_cover_its_samples_once_and_in_order(
    layout: tuple[int, int, int], steps: int, start: int
) -> None:
    mbs, dp, micro = layout
    gbs = mbs * dp * micro
    ranks = [iterator(mbs, rank, dp, gbs, start) for rank in range(dp)]
    for step in range(steps):
        rows = [row for it in ranks for row in step_rows(it)]
        assert rows == list(range(start + step * gbs, start + (step + 1) * gbs))
    assert {it.consumed_samples for it in ranks} == {start + steps * gbs}


@given(layout=layouts, other=layouts, before=st.integers(0, 3), inside=st.integers(0, 3))
def test_a_run_continued_on_another_layout_sees_what_an_uninterrupted_one_sees(
    layout: tuple[int, int, int], other: tuple[int, int, int], before: int, inside: int
) -> None:
    mbs, dp, micro = layout
    gbs = mbs * dp * micro
    first = iterator(mbs, 0, dp, gbs)
    for _ in range(before):
        step_rows(first)
    for _ in range(min(inside, micro - 1)):
        next(first)  # stopped inside a step: the step is repeated as a whole
    assert first.consumed_samples == before * gbs

    mbs2, dp2, micro2 = other
    gbs2 = mbs2 * dp2 * micro2
    rows: list[int] = []
    for rank in range(dp2):
        rows += step_rows(iterator(mbs2, rank, dp2, gbs2, first.consumed_samples))
    assert rows == list(range(before * gbs, before * gbs + gbs2))


@pytest.mark.parametrize(
    ("mbs", "rank", "dp", "gbs", "consumed", "message"),
    [
        (2, 0, 3, 8, 0, r"global_batch_size: 8 is not a multiple .*= 6; the nearest that is: 6"),
        (8, 0, 1, 4, 0, "nearest that is: 8"),
        (0, 0, 1, 4, 0, "micro_batch_size: 0"),
        (1, 0, 0, 4, 0, "data_parallel_size: 0"),
        (1, 0, 1, 0, 0, "global_batch_size: 0"),
        (1, 2, 2, 4, 0, "data_parallel_rank: 2"),
        (1, 0, 1, 4, -1, "consumed_samples: -1"),
    ],
)
def test_bad_numbers(mbs: int, rank: int, dp: int, gbs: int, consumed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        iterator(mbs, rank, dp, gbs, consumed)
