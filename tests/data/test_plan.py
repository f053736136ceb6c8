from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.data.build import load_manifest
from prism_nemo.data.manifest import Manifest
from prism_nemo.data.plan import (
    DataPlan,
    Drawn,
    Segment,
    check_epochs,
    continue_plan,
    epochs_needed,
    make_plan,
)
from prism_nemo.errors import InputError

SHARES = {"abc": 0.6, "xyz": 0.3, "uvw": 0.1}


def plan_of(built: Path, **changes: object) -> DataPlan:
    values = {"seq_length": 32, "seed": 5, "packing": "best_fit", **changes}
    return make_plan(load_manifest(built), **values)  # type: ignore[arg-type]


def source(name: str, share: float, rows: int = 10, fill: float = 1.0, text: str = "0") -> Drawn:
    return Drawn(name, f"{name}-{text}", share, rows, fill)


def made_up(*segments: tuple[int, tuple[Drawn, ...]]) -> DataPlan:
    return DataPlan(0, 8, "best_fit", tuple(Segment(first, sources) for first, sources in segments))


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_shares_of_tokens_are_realised(built: Path, packing: str) -> None:
    plan = plan_of(built, packing=packing, seq_length=150)
    counts = plan.counts(100_000)
    tokens = {drawn.name: counts[drawn.prefix] * drawn.fill for drawn in plan.sources}
    for name, share in SHARES.items():
        assert tokens[name] / sum(tokens.values()) == pytest.approx(share, abs=1e-4)


def test_a_source_whose_rows_hold_more_padding_is_given_more_of_them() -> None:
    plan = made_up((0, (source("half", 0.5, fill=0.5), source("full", 0.5))))
    assert plan.counts(300) == {"half-0": 200, "full-0": 100}


def test_weight_zero_is_never_drawn(built: Path) -> None:
    assert [drawn.name for drawn in plan_of(built).sources] == list(SHARES)


def test_the_order_does_not_depend_on_where_one_starts_to_look(built: Path) -> None:
    plan = plan_of(built)
    forward = [plan.locate(i) for i in range(9000)]
    backward = [plan.locate(i) for i in reversed(range(9000))]
    assert forward == backward[::-1]
    seen: Counter[str] = Counter()
    for drawn, number in forward:
        assert number == seen[drawn.prefix]  # every source's samples in their order, none left out
        seen[drawn.prefix] += 1
    assert seen == plan.counts(9000)
    with pytest.raises(IndexError):
        plan.locate(-1)


def test_a_plan_survives_being_written_down(built: Path) -> None:
    plan = plan_of(built)
    again = DataPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.hash == plan.hash
    for change in ({"seed": 6}, {"seq_length": 33}, {"packing": "concatenate"}):
        assert plan_of(built, **change).hash != plan.hash


@settings(max_examples=50)
@given(change_at=st.integers(0, 9000), samples=st.integers(0, 12000))
def test_a_changed_mixture_goes_on_where_each_source_was(change_at: int, samples: int) -> None:
    a, b, c = source("a", 0.7), source("b", 0.3), source("c", 0.5)
    before = made_up((0, (a, b)))
    plan = before.changed_to((dataclasses.replace(a, share=0.5), c), change_at)
    counts = plan.counts(samples)
    assert sum(counts.values()) == samples
    assert plan.counts(min(samples, change_at)) == before.counts(min(samples, change_at))
    if samples > change_at:
        had = before.counts(change_at).get(a.prefix, 0)
        numbers = [number for drawn, number in map(plan.locate, range(change_at, samples)[:50]) if drawn.name == "a"]
        assert numbers == list(range(had, had + len(numbers)))


def test_other_text_under_the_same_name_starts_from_its_beginning() -> None:
    plan = made_up((0, (source("a", 1.0),))).changed_to((source("a", 1.0, text="1"),), 100)
    assert plan.locate(99)[1] == 99
    assert plan.locate(100)[1] == 0
    assert plan.counts(150) == {"a-0": 100, "a-1": 50}


def test_a_change_at_the_same_sample_takes_the_place_of_an_earlier_one() -> None:
    """A run that was killed before it saved finds itself at the same sample, and may be given another mixture again."""
    a, b, c = source("a", 0.5), source("b", 0.5), source("c", 0.5)
    plan = made_up((0, (a, b))).changed_to((a, c), 40).changed_to((b, c), 40)
    assert [segment.first_sample for segment in plan.segments] == [0, 40]
    assert plan.sources == (b, c)
    assert made_up((0, (a,))).changed_to((b,), 0).segments == (Segment(0, (b,)),)


def test_continuing_asks_before_it_changes_anything(built: Path) -> None:
    recorded = plan_of(built)
    assert continue_plan(recorded, recorded, 64, change=False) == recorded
    assert continue_plan(recorded, recorded, 64, change=True) == recorded
    for name, value in (("seed", 6), ("seq_length", 16), ("packing", "concatenate")):
        with pytest.raises(InputError, match=f"{name} is {value}, but this run was started with"):
            continue_plan(recorded, plan_of(built, **{name: value}), 64, change=True)
    abc, xyz, _ = recorded.sources
    other = dataclasses.replace(
        recorded,
        segments=(Segment(0, (dataclasses.replace(abc, share=0.5), dataclasses.replace(xyz, prefix="xyz-new"))),),
    )
    message = (
        r"uvw is no longer drawn from; abc has 50\.00% instead of 60\.00%; xyz holds other text"
        r".*sample 64.*change_mixture=true"
    )
    with pytest.raises(InputError, match=message):
        continue_plan(recorded, other, 64, change=False)
    changed = continue_plan(recorded, other, 64, change=True)
    assert [segment.first_sample for segment in changed.segments] == [0, 64]
    # Going on after the change is no change.
    assert continue_plan(changed, other, 100, change=False) == changed


def test_epochs_that_a_stretch_reads() -> None:
    plan = made_up((0, (source("a", 0.5, rows=10), source("b", 0.5, rows=3))))
    needed = epochs_needed(plan, 0, 14)  # seven samples each
    assert needed == {"a-0": range(1), "b-0": range(3)}
    assert epochs_needed(plan, 14, 16) == {"a-0": range(1), "b-0": range(2, 3)}
    assert epochs_needed(plan, 20, 22) == {"a-0": range(1, 2), "b-0": range(3, 4)}
    assert epochs_needed(plan, 5, 5) == {}


def limited(built: Path, epochs: float) -> Manifest:
    manifest = load_manifest(built)
    manifest.source("abc").max_epochs = epochs
    return manifest


def test_a_run_that_repeats_too_often_is_refused_with_the_arithmetic(built: Path) -> None:
    plan = plan_of(built)
    rows = plan.sources[0].rows_per_epoch
    per_sample = plan.counts(10**6)[plan.sources[0].prefix] / 10**6
    fits = int(2 * rows / per_sample)
    check_epochs(plan, limited(built, 2), fits)
    with pytest.raises(InputError, match=rf"abc: .* one epoch is {rows:,}, so 2\.0\d epochs, max_epochs 2\. Train"):
        check_epochs(plan, limited(built, 2), fits + 4)


def test_bad_requests(built: Path) -> None:
    for changes, message in (
        ({"seq_length": 0}, "seq_length 0"),
        ({"seed": -1}, "seed -1"),
        ({"packing": "bestfit"}, "did you mean 'best_fit'"),
    ):
        with pytest.raises(InputError, match=message):
            plan_of(built, **changes)
