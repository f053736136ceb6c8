"""Effects over seeds: mean, interval, and whether two seeds differ by less than the effect."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from prism_nemo.evaluation.statistics.quantiles import t_quantile
from prism_nemo.study.tidy import Table

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Effect:
    """One number over the seeds of a family, or over all families and seeds.

    Attributes:
        values: One for each family and seed.
        mean: Of them.
        low: Of the 95 % interval of the mean by Student's t over the seeds; -inf with a single seed.
        high: The same.
        spread: The largest difference between two seeds of one family; None with a single seed.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    spread: float | None

    @property
    def clear(self) -> bool:
        """Whether two seeds of one family differ by less than the effect."""
        return self.spread is not None and self.spread < abs(self.mean)


def effect(table: Table, of: Callable[[str, int], float | None], family: str | None = None) -> Effect | None:
    """An effect over seeds.

    Seeds of one family share test questions and their sampling; families share the seed's texts and batches too. So
    each family's seeds are averaged first for the mean, and the interval is over seeds: of one family its values, of
    several the means over families at each seed, which counts what families share once.

    Args:
        table: The numbers.
        of: Gives the number of a family and seed, or None.
        family: Only this one; all if not given.

    Returns:
        None if nothing was measured.
    """
    found: dict[str, dict[int, float]] = {}
    for name, seed in table.groups:
        value = of(name, seed) if family in (None, name) else None
        if value is not None and math.isfinite(value):
            found.setdefault(name, {})[seed] = value
    if not found:
        return None
    values = tuple(value for seeds in found.values() for value in seeds.values())
    # Only seeds that every family has: a mean over other families at each seed would be a difference of families.
    shared = set.intersection(*(set(seeds) for seeds in found.values()))
    by_seed = [statistics.fmean(seeds[seed] for seeds in found.values()) for seed in sorted(shared)]
    if len(by_seed) < 2:
        mean = statistics.fmean(by_seed or values)
        return Effect(values, mean, -math.inf, math.inf, None)
    mean = statistics.fmean(by_seed)
    half = t_quantile(CONFIDENCE, len(by_seed) - 1) * statistics.stdev(by_seed) / math.sqrt(len(by_seed))
    spread = max(max(seeds.values()) - min(seeds.values()) for seeds in found.values())
    return Effect(values, mean, mean - half, mean + half, spread)
