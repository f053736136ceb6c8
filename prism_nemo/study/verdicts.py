"""The study's claims and the rules that judge them, written before any result was seen.

A bound on an effect is met if the 95 % interval over seeds lies on the right side of it, broken if it lies on the wrong
side, and open otherwise. A difference that is claimed must also be larger than that of any two seeds of one family,
or it stays open. With a single seed there is no interval, and everything stays open.

- all bounds met: *holds*; one broken: *does not hold*; else *cannot be told at this size*;
- all bounds met, and the null model or control of the claim meets them as well: *explained by the null model*.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_nemo.study.behaviour import TASKS
from prism_nemo.study.effects import Effect, effect
from prism_nemo.study.tidy import Table

HOLDS, NOT, NULL, OPEN = (
    "holds",
    "does not hold",
    "explained by the null model",
    "cannot be told at this size",
)
Of = Callable[[str, int], float | None]

RL, NO_SCIENCE, RANDOM, SHUFFLED = "rl-mcs-study-think", "rl-mcs-no-science", "rl-mcs-random", "rl-mcs-shuffled"
FROM_BASE = ("rl-base-study-think", "rl-base-study-free", "rl-base-own-think", "rl-base-own-free")
POINTS = 0.05  # of accuracy, or of a share of weights: what counts as a difference
NATS = 0.15  # of general loss; the first trials of the pocket setting lost 0.14 with 15 % replay, and 8 without


@dataclass(frozen=True)
class Bound:
    """One effect and the range that the claim, or its null model, asks of it.

    Attributes:
        label: What the effect is.
        effect: None where nothing was measured.
        low: The least it may be.
        high: The most.
        difference: Whether it must exceed the difference of two seeds.
        null: Whether it belongs to the null model: met, it explains the claim away.
        unit: points, nats or empty.
    """

    label: str
    effect: Effect | None
    low: float = -math.inf
    high: float = math.inf
    difference: bool = False
    null: bool = False
    unit: str = "points"

    @property
    def digits(self) -> int:
        """Decimals that it is shown with."""
        return 3 if self.unit else 4

    @property
    def state(self) -> str:
        """met, broken or open."""
        e = self.effect
        if e is None or e.spread is None:
            return "open"
        if e.high < self.low or e.low > self.high:
            return "broken"
        if e.low >= self.low and e.high <= self.high:
            return "open" if self.difference and not e.clear else "met"
        return "open"


@dataclass(frozen=True)
class Claim:
    """A claim of the study's abstract.

    Attributes:
        key: Short.
        text: As the study says it.
        rule: What is asked, in words.
        bounds: Gives the bounds for a table and a family, or all of them.
    """

    key: str
    text: str
    rule: str
    bounds: Callable[[Table, str | None], Sequence[Bound]]


def decide(bounds: Sequence[Bound]) -> str:
    """The verdict on bounds; see the module."""
    own = [bound.state for bound in bounds if not bound.null]
    nulls = [bound.state for bound in bounds if bound.null]
    if "broken" in own:
        return NOT
    if not own or "open" in own:
        return OPEN
    if not nulls or "broken" in nulls:
        return HOLDS
    return NULL if all(state == "met" for state in nulls) else OPEN


def mean_of_tasks(table: Table, cell: str, measure: str, tasks: Sequence[str] = TASKS) -> Of:
    """A measure of a cell, mean over tasks; None where one of them was not measured."""

    def of(family: str, seed: int) -> float | None:
        values = [table.value(family, seed, cell, measure, task) for task in tasks]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if len(known) == len(values) else None

    return of


def _accuracy(table: Table, cell: str, tasks: Sequence[str] = TASKS) -> Of:
    return mean_of_tasks(table, cell, "accuracy", tasks)


def _minus(one: Of, two: Of) -> Of:
    def of(family: str, seed: int) -> float | None:
        a, b = one(family, seed), two(family, seed)
        return None if a is None or b is None else a - b

    return of


def _value(table: Table, cell: str, measure: str, name: str = "") -> Of:
    return lambda family, seed: table.value(family, seed, cell, measure, name)


def _absolute(one: Of) -> Of:
    def of(family: str, seed: int) -> float | None:
        value = one(family, seed)
        return None if value is None else abs(value)

    return of


def _best_from_base(table: Table) -> Of:
    """The best of RL from the base under both filters and gates; without the gate it is judged without it."""

    def of(family: str, seed: int) -> float | None:
        values = []
        for cell in FROM_BASE:
            measure = "free_accuracy" if cell.endswith("free") else "accuracy"
            gain = _minus(mean_of_tasks(table, cell, measure), mean_of_tasks(table, "base", measure))
            values.append(gain(family, seed))
        known = [value for value in values if value is not None]
        return max(known) if len(known) == len(values) else None

    return of


def _outside_nulls(table: Table, cell: str) -> Of:
    """How far the share of weights changed by 1 % lies outside the range of the nulls that know only the schedule."""

    def of(family: str, seed: int) -> float | None:
        seen = table.value(family, seed, cell, "changed_1_percent", "observed")
        nulls = [table.value(family, seed, cell, "changed_1_percent", n) for n in ("random_walk", "drift")]
        known = [value for value in nulls if value is not None]
        if seen is None or len(known) < len(nulls):
            return None
        return max(0.0, min(known) - seen, seen - max(known))

    return of


def _composition(table: Table, family: str | None) -> list[Bound]:
    science = ("formulas",)
    mid = _minus(_accuracy(table, RL, science), _accuracy(table, "rl-mc-study-think", science))
    rl = _minus(_accuracy(table, RL, science), _accuracy(table, NO_SCIENCE, science))
    noise = _absolute(_minus(_accuracy(table, "mcs", science), _accuracy(table, "mcs-again", science)))
    excess = _minus(noise, mid)
    return [
        Bound(
            "science after RL: mid-trained with science, less without", effect(table, mid, family), POINTS,
            difference=True,
        ),
        Bound("science after RL: RL prompts with science, less without", effect(table, rl, family), -POINTS, POINTS),
        Bound(
            "null: same mixture in another order, less that difference", effect(table, excess, family), 0.0, null=True
        ),
    ]  # fmt: skip


def _from_base(table: Table, family: str | None) -> list[Bound]:
    best = _best_from_base(table)
    gain = _minus(_accuracy(table, RL), _accuracy(table, "mcs"))
    return [
        Bound(
            "accuracy gained by RL from the base, best of both filters and gates", effect(table, best, family),
            high=POINTS,
        ),
        Bound("gained by RL from the mid-trained model, less that", effect(table, _minus(gain, best), family), 0.0),
    ]  # fmt: skip


def _gain(table: Table, family: str | None) -> list[Bound]:
    gain = _minus(_accuracy(table, RL), _accuracy(table, "mcs"))
    random = _minus(_accuracy(table, RANDOM), _accuracy(table, "mcs"))
    shuffled = _minus(_accuracy(table, SHUFFLED), _accuracy(table, "mcs"))
    return [
        Bound("accuracy gained by RL on the mid-trained model", effect(table, gain, family), 0.0, difference=True),
        Bound(
            "null: gained with random reward, less that", effect(table, _minus(random, gain), family), 0.0,
            null=True,
        ),
        Bound(
            "null: gained with shuffled reward, less that", effect(table, _minus(shuffled, gain), family), 0.0,
            null=True,
        ),
    ]  # fmt: skip


def _weights(table: Table, family: str | None) -> list[Bound]:
    def share(cell: str) -> Effect | None:
        return effect(table, _value(table, cell, "changed_1_percent", "observed"), family)

    return [
        Bound("weights changed > 1 % by mid-training", share("mcs"), 0.9),
        Bound("weights changed > 1 % by RL", share(RL), high=0.1),
        Bound(
            "null: mid-training's share outside what its learning rates alone give",
            effect(table, _outside_nulls(table, "mcs"), family), high=POINTS, null=True,
        ),
        Bound(
            "null: RL's share outside what its learning rates alone give",
            effect(table, _outside_nulls(table, RL), family), high=POINTS, null=True,
        ),
    ]  # fmt: skip


def _cka(table: Table, family: str | None) -> list[Bound]:
    seen, null = _value(table, RL, "cka_plain_min"), _value(table, RL, "cka_null_plain_min")
    return [
        Bound("least CKA of any layer, RL against its start", effect(table, seen, family), 0.998, unit=""),
        Bound(
            "null: that of a random update of the same size, less that", effect(table, _minus(null, seen), family),
            -0.001, null=True, unit="",
        ),
    ]  # fmt: skip


def _same(table: Table, family: str | None) -> list[Bound]:
    def share(cell: str) -> Of:
        return _value(table, cell, "changed_1_percent", "observed")

    base, mid = share("rl-base-study-think"), share(RL)

    def cosine(one: str, two: str) -> Of:
        return lambda name, seed: table.pair(name, seed, one, two, "cosine")

    same = effect(table, cosine("rl-base-study-think", RL), family)
    return [
        Bound("share of weights changed, RL from base less from mid-trained", effect(table, _minus(base, mid), family),
              -POINTS, POINTS),
        Bound("null: random reward's share less the real reward's", effect(table, _minus(share(RANDOM), mid), family),
              -POINTS, POINTS, null=True),
        Bound("null: cosine of the two updates (identical would be 1)", same, -0.5, 0.5, null=True, unit=""),
    ]  # fmt: skip


def _retention(table: Table, family: str | None) -> list[Bound]:
    def loss(cell: str) -> Of:
        return _value(table, cell, "general_loss")

    def bound(label: str, one: str, two: str, **limits: float) -> Bound:
        return Bound(label, effect(table, _minus(loss(one), loss(two)), family), unit="nats", **limits)  # type: ignore[arg-type]

    return [
        bound("general loss after mid-training, less the base's", "mcs", "base", high=NATS),
        bound("general loss after RL, less before it", RL, "mcs", high=NATS),
        bound("general loss without the retention share, less with it", "noret", "mcs", low=NATS),
    ]


CLAIMS = (
    Claim(
        "composition", "Data composition matters most at mid-training, not RL",
        f"at least {POINTS:.2f} more from science in mid-training, at most {POINTS:.2f} either way from science in RL",
        _composition,
    ),
    Claim(
        "from-base", "RL directly on the base is far less effective",
        f"RL gains at most {POINTS:.2f} from the base, however it is filtered and gated, and less than from `mcs`",
        _from_base,
    ),
    Claim(
        "gain", "RL after mid-training improves reasoning",
        "a gain above 0 that random and shuffled rewards do not give as well", _gain,
    ),
    Claim(
        "weights", "Mid-training changes over 90 % of weights, RL about 5 %",
        f"shares of at least 0.9 and at most 0.1; explained if learning rates and steps alone come within {POINTS:.2f}",
        _weights,
    ),
    Claim(
        "cka", "RL preserves representations: CKA above 0.998",
        "above 0.998 at every layer; explained if a random update of the same size comes within 0.001", _cka,
    ),
    Claim(
        "same-change", "RL makes the same changes from any start",
        f"shares within {POINTS:.2f}; explained if random reward gives them too and directions differ (cosine < 0.5)",
        _same,
    ),
    Claim(
        "retention", "General abilities are retained",
        f"at most {NATS:.2f} nats lost by each stage, and at least as much more without the retention share",
        _retention,
    ),
)  # fmt: skip
