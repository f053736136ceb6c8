from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_nemo.data.batches import BatchIterator
from prism_nemo.errors import InputError, PrismError


class Numbered:
    """Sample i holds i everywhere."""

    def __init__(self, size: int, seq_length: int = 3) -> None:
        self.size, self.seq_length = size, seq_length

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.full((self.seq_length,), index)
        return {"tokens": row, "labels": row + 1, "loss_mask": torch.ones(self.seq_length), "position_ids": row}


def iterator(size: int, mbs: int, rank: int, dp: int, gbs: int, consumed: int = 0) -> BatchIterator:
    return BatchIterator(
        Numbered(size),
        micro_batch_size=mbs,
        data_parallel_rank=rank,
        data_parallel_size=dp,
        global_batch_size=gbs,
        consumed_samples=consumed,
    )


def step_rows(it: BatchIterator) -> list[int]:
    return [int(row) for _ in range(it.micro_batches_per_step) for row in next(it)["tokens"][:, 0]]


layouts = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # mbs, dp, micro-batches per rank


@given(layout=layouts, steps=st.integers(1, 4), start=st.integers(0, 50))
def test_the_ranks_of_a_step_cover_its_samples_once_and_in_order(
    layout: tuple[int, int, int], steps: int, start: int
) -> None:
    mbs, dp, micro = layout
    gbs = mbs * dp * micro
    ranks = [iterator(start + steps * gbs, mbs, rank, dp, gbs, start) for rank in range(dp)]
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
    first = iterator(10**6, mbs, 0, dp, gbs)
    for _ in range(before):
        step_rows(first)
    for _ in range(min(inside, micro - 1)):
        next(first)  # stopped inside a step: the step is repeated as a whole
    state = first.state_dict()
    assert state == {"consumed_samples": before * gbs}

    mbs2, dp2, micro2 = other
    gbs2 = mbs2 * dp2 * micro2
    rows: list[int] = []
    for rank in range(dp2):
        it = iterator(10**6, mbs2, rank, dp2, gbs2)
        it.load_state_dict(state)
        rows += step_rows(it)
    assert rows == list(range(before * gbs, before * gbs + gbs2))


def test_loading_a_state_forgets_a_half_done_step() -> None:
    it = iterator(100, 1, 0, 1, 4)
    next(it)
    it.load_state_dict({"consumed_samples": 8})
    assert step_rows(it) == [8, 9, 10, 11]


def test_shapes_and_types() -> None:
    batch = next(iterator(8, 2, 0, 2, 8))
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "tokens": ((2, 3), torch.int64),
        "labels": ((2, 3), torch.int64),
        "loss_mask": ((2, 3), torch.float32),
        "position_ids": ((2, 3), torch.int64),
    }


def test_the_end_of_the_data_is_an_error_that_says_how_to_get_more() -> None:
    it = iterator(10, 2, 0, 1, 4)
    for _ in range(4):
        next(it)
    with pytest.raises(PrismError, match=r"samples 8 to 11.*built for 10.*num_samples"):
        next(it)
    assert it.state_dict() == {"consumed_samples": 8}


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
        iterator(100, mbs, rank, dp, gbs, consumed)


@pytest.mark.parametrize("state", [{}, {"consumed_samples": "3"}, {"consumed_samples": -4}])
def test_a_damaged_state(state: dict[str, int]) -> None:
    with pytest.raises(InputError, match="consumed_samples"):
        iterator(100, 1, 0, 1, 4).load_state_dict(state)
