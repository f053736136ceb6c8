from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_nemo.data.interleave import Interleave
from prism_nemo.errors import InputError

weights = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=12)


def by_definition(shares: np.ndarray, samples: int) -> tuple[list[int], list[int]]:
    """Webster's method as it is written down: one at a time, to whoever is due first."""
    had = [0] * len(shares)
    source, number = [], []
    for _ in range(samples):
        due = min(range(len(shares)), key=lambda s: ((had[s] + 0.5) / shares[s], s))
        source.append(due)
        number.append(had[due])
        had[due] += 1
    return source, number


@given(weights=weights, samples=st.integers(0, 200))
def test_it_is_websters_sequence(weights: list[float], samples: int) -> None:
    interleave = Interleave(weights)
    source, number = interleave.locate(0, samples)
    assert (source.tolist(), number.tolist()) == by_definition(interleave.shares, samples)
    assert interleave.counts(samples).tolist() == np.bincount(source, minlength=len(weights)).tolist()


@given(weights=weights, first=st.integers(0, 10**12), count=st.integers(0, 50), cut=st.integers(0, 50))
def test_any_stretch_is_the_same_however_it_is_asked_for(
    weights: list[float], first: int, count: int, cut: int
) -> None:
    interleave = Interleave(weights)
    cut = min(cut, count)
    whole = interleave.locate(first, count)
    parts = interleave.locate(first, cut), interleave.locate(first + cut, count - cut)
    for i in range(2):
        assert whole[i].tolist() == np.concatenate([part[i] for part in parts]).tolist()
    assert int(interleave.counts(first).sum()) == first


@given(weights=weights, samples=st.integers(0, 10**12))
def test_shares_are_met_at_every_point(weights: list[float], samples: int) -> None:
    interleave = Interleave(weights)
    off = np.abs(interleave.counts(samples) - samples * interleave.shares)
    assert (off <= 0.5 + interleave.shares * len(weights) / 2 + 1e-3).all()


def test_equal_weights_take_turns() -> None:
    source, _ = Interleave([1, 1, 1]).locate(0, 9)
    assert source.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("weights", [[], [0.5, 0.0], [-1.0], [float("nan")], [float("inf")]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(InputError, match="positive"):
        Interleave(weights)
