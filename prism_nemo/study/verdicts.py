"""The study's claims and the rules that judge them.

They were written before the first cell was run; `claims.MENDED` says what was changed since. A bound on an effect is
met if the 95 % interval over seeds lies on the right side of it, broken if it lies on the wrong side, and open
otherwise. A difference that is claimed must also be larger than that of any two seeds of one family, or it stays
open. With a single seed there is no interval, and everything stays open.

- all bounds met: *holds*; one broken: *does not hold*; else *cannot be told at this size*;
- all bounds met, and the null model or control of the claim meets them as well: *explained by the null model*.

Effects that are only *told* stand beside them, for what the rules leave out; no verdict depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_nemo.study.effects import Effect
from prism_nemo.study.tidy import Table

HOLDS, NOT, NULL, OPEN = (
    "holds",
    "does not hold",
    "explained by the null model",
    "cannot be told at this size",
)
_DIGITS = {"points": 3, "nats": 3, "count": 0}


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
        told: Whether it is no part of the verdict; it has no range then.
        unit: points, nats, count or empty.
    """

    label: str
    effect: Effect | None
    low: float = -math.inf
    high: float = math.inf
    difference: bool = False
    null: bool = False
    told: bool = False
    unit: str = "points"

    @property
    def digits(self) -> int:
        """Decimals that it is shown with."""
        return _DIGITS.get(self.unit, 4)

    @property
    def ends(self) -> tuple[float, ...]:
        """The ends of the range that there are."""
        return tuple(value for value in (self.low, self.high) if math.isfinite(value))

    @property
    def asked(self) -> str:
        """The range in words."""
        sides = [f"at least {self.low:g}"] if math.isfinite(self.low) else []
        sides += [f"at most {self.high:g}"] if math.isfinite(self.high) else []
        return ", ".join(sides or ["-"]) + (", more than between seeds" if self.difference else "")

    def allows(self, value: float) -> bool:
        """Whether a value is within the range."""
        return self.low <= value <= self.high

    @property
    def state(self) -> str:
        """met, broken, open or told."""
        e = self.effect
        if self.told:
            return "told"
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
        limits: What the rule does not see at this size, or in this study; whoever reads the verdict must know it.
        bounds: Gives the bounds for a table and a family, or all of them.
    """

    key: str
    text: str
    rule: str
    limits: str
    bounds: Callable[[Table, str | None], Sequence[Bound]]

    def by_family(self, table: Table) -> dict[str | None, Sequence[Bound]]:
        """The bounds over all families (None), and those of each."""
        return {family: self.bounds(table, family) for family in (None, *table.families)}


def decide(bounds: Sequence[Bound]) -> str:
    """The verdict on bounds; see the module."""
    own = [bound.state for bound in bounds if not bound.null and not bound.told]
    nulls = [bound.state for bound in bounds if bound.null]
    if "broken" in own:
        return NOT
    if not own or "open" in own:
        return OPEN
    if not nulls or "broken" in nulls:
        return HOLDS
    return NULL if all(state == "met" for state in nulls) else OPEN
