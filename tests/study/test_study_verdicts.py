"""Every verdict of every claim, on made-up measures."""

from __future__ import annotations

import math

import pytest
from made_up_study import TASKS, Key, made_up

from prism_nemo.study.claims import CLAIMS, mean_of_tasks
from prism_nemo.study.effects import effect
from prism_nemo.study.verdicts import HOLDS, NOT, NULL, OPEN, Bound, decide

CLAIM = {claim.key: claim for claim in CLAIMS}
RL, RANDOM, BASE_RL = "rl-mcs-study-think", "rl-mcs-random", "rl-base-study-think"


def _accuracy(cell: str, value: float, tasks: tuple[str, ...] = TASKS) -> dict[Key, float]:
    return {(cell, kind, task): value for task in tasks for kind in ("accuracy", "free_accuracy")}


def _share(cell: str, value: float, null: float | None = None) -> dict[Key, float]:
    found = {(cell, "changed_1_percent", "observed"): value}
    if null is not None:
        found |= {(cell, "changed_1_percent", name): null for name in ("random_walk", "drift")}
    return found


def _verdict(key: str, **table: object) -> str:
    return decide(CLAIM[key].bounds(made_up(**table), None))  # type: ignore[arg-type]


SAME_AS_RANDOM = _share(RANDOM, 0.06)
CASES = [
    ("composition", {}, HOLDS),
    ("composition", _accuracy("rl-mc-study-think", 0.75), NOT),
    ("composition", _accuracy("rl-mcs-no-science", 0.3, ("formulas",)), NOT),
    ("composition", _accuracy("mcs-again", 0.0, ("formulas",)) | _accuracy("rl-mc-study-think", 0.6), NULL),
    ("from-base", {}, HOLDS),
    ("from-base", _accuracy("rl-base-own-free", 0.4), NOT),
    ("from-base", _accuracy("rl-base-own-think", 0.4), NOT),
    ("from-base", _accuracy(RL, 0.55), NOT),
    ("gain", {}, HOLDS),
    ("gain", _accuracy(RL, 0.5), NOT),
    ("gain", _accuracy(RANDOM, 0.8) | _accuracy("rl-mcs-shuffled", 0.8), NULL),
    ("gain", _accuracy(RANDOM, 0.8), NULL),  # one control is enough
    ("gain", _accuracy("rl-mcs-shuffled", 0.8), NULL),
    ("gain", _accuracy(RANDOM, 0.7), HOLDS),  # most of the gain is not all of it
    ("weights", {}, HOLDS),
    ("weights", _share("mcs", 0.7), NOT),
    ("weights", _share(RL, 0.4), NOT),
    ("weights", _share("mcs", 0.95, 0.94) | _share(RL, 0.06, 0.07), NULL),
    ("cka", {}, HOLDS),
    ("cka", {(RL, "cka_plain_min", ""): 0.99}, NOT),
    ("cka", {(RL, "cka_null_plain_min", ""): 0.9999}, NULL),
    ("cka", {(RL, "cka_null_plain_min", ""): 0.9981}, NULL),  # it meets the claim, though less well
    ("cka", {(RL, "cka_plain_min", ""): 0.9984, (RL, "cka_null_plain_min", ""): 0.9977}, HOLDS),
    ("same-change", {}, HOLDS),
    ("same-change", _share(BASE_RL, 0.4), NOT),
    ("same-change", SAME_AS_RANDOM, NULL),
    ("retention", {}, HOLDS),
    ("retention", {("mcs", "general_loss", ""): 5.0}, NOT),
    ("retention", {("noret", "general_loss", ""): 4.06}, NOT),
    ("retention", {(RL, "general_loss", ""): 4.8}, NOT),
]


@pytest.mark.parametrize(("key", "changes", "verdict"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_verdict(key: str, changes: dict[Key, float], verdict: str) -> None:
    assert _verdict(key, changes=changes) == verdict


@pytest.mark.parametrize("key", list(CLAIM))
def test_one_seed_tells_nothing(key: str) -> None:
    assert _verdict(key, seeds=(1234,)) == OPEN


@pytest.mark.parametrize("key", list(CLAIM))
def test_seeds_that_differ_more_than_the_effect_tell_nothing(key: str) -> None:
    assert _verdict(key, jitter=300.0) == OPEN


def test_equal_directions_are_not_explained_by_random_reward() -> None:
    assert _verdict("same-change", changes=SAME_AS_RANDOM, cosine=0.9) == HOLDS


def test_an_effect_below_the_difference_of_two_seeds_stays_open() -> None:
    table = made_up()
    values = {("llama", 1234): 0.01, ("llama", 1235): 0.05, ("llama", 1236): 0.04}
    values |= {("nemotron_h", 1234): 0.05, ("nemotron_h", 1235): 0.01, ("nemotron_h", 1236): 0.02}
    found = effect(table, lambda family, seed: values[family, seed])
    assert found is not None
    assert found.low > 0
    assert Bound("", found, 0.0).state == "met"
    assert Bound("", found, 0.0, difference=True).state == "open"


@pytest.mark.parametrize("cell", ["rl-base-own-free", "rl-base-study-think"])
def test_a_mean_or_a_best_over_less_than_all_is_not_measured(cell: str) -> None:
    """What is missing may be the task that changed it, or the arm that was the best."""
    table = made_up()
    for row in table.rows:
        if (row["cell"], row["name"]) == (cell, "lists"):
            row["value"] = None
    assert mean_of_tasks(table, cell, "accuracy")("llama", 1234) is None
    assert CLAIM["from-base"].bounds(table, None)[0].effect is None
    assert decide(CLAIM["from-base"].bounds(table, None)) == OPEN


def test_nothing_measured_is_open() -> None:
    assert Bound("", None, 0.0).state == "open"
    assert decide([]) == OPEN


def test_interval_is_students_over_seeds() -> None:
    table = made_up()
    values = {1234: 1.0, 1235: 2.0, 1236: 4.0}
    found = effect(table, lambda family, seed: values[seed], "llama")
    assert found is not None
    half = 4.302652729911275 * math.sqrt(7 / 3) / math.sqrt(3)  # t(0.975, 2), sample deviation of 1, 2, 4
    assert found.mean == pytest.approx(7 / 3)
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert found.spread == 3.0


def test_families_share_a_seed_and_are_averaged_at_it() -> None:
    """Two families with the same numbers are no more evidence than one."""
    table = made_up()
    one = effect(table, lambda family, seed: float(seed - 1234), "llama")
    both = effect(table, lambda family, seed: float(seed - 1234))
    assert one is not None
    assert both is not None
    assert (one.low, one.high) == pytest.approx((both.low, both.high))
