"""Which source each sample of a run is drawn from: a pure function of the weights and the sample's number.

The n-th sample of a source of share w is due at time (n + 1/2) / w; samples are taken in the order in which they are
due, earlier sources first where two are due at once. This is the sequence of Webster's (Sainte-Lague's) method of
apportionment: after any number of samples m, a source of K has had m w of them, give or take 1/2 + w K / 2.

Nothing is stored: where the m-th sample comes from is found from the shares alone, so that the order does not depend on
how long the run is, and neither does memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prism_nemo.errors import InputError


class Interleave:
    """The endless sequence of sources for one set of weights.

    Args:
        weights: Positive; normalised to shares of samples.

    Raises:
        InputError: No weights, or one that is not a positive number.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, np.float64)
        if not len(shares) or not np.isfinite(shares).all() or shares.min() <= 0:
            raise InputError(f"weights of sources must be positive numbers, not {list(weights)}")
        self.shares = shares / shares.sum()

    def counts(self, samples: int) -> np.ndarray:
        """Returns how many of the first `samples` samples each source has, (sources,) int64."""
        sources = len(self.shares)
        # Up to this time fewer samples are due than asked for (each source's number is rounded, by less than one), so
        # all of those are among them, and only a few more have to be put in order.
        due = np.ceil(max(0.0, samples - 2.0 * sources - 4.0) * self.shares - 0.5)
        counts = np.maximum(due, 0).astype(np.int64)
        missing = samples - int(counts.sum())
        more, _ = self._next(counts, missing)
        return counts + np.bincount(more, minlength=sources)

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns, for samples `first` to `first + count - 1`, the source and which of that source's samples it is.

        Args:
            first: 0 or more.
            count: 0 or more.

        Returns:
            `(source, number)`, each (count,) int64; `number` counts from 0 in every source.
        """
        return self._next(self.counts(first), count)

    def _next(self, counts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` samples that follow when each source has had `counts`."""
        sources = len(self.shares)
        # No source can have more than its share of what follows, and what roundings have left it behind by.
        at_most = np.minimum(np.ceil(count * self.shares).astype(np.int64) + 2 * sources + 4, count)
        source = np.repeat(np.arange(sources), at_most)
        number = np.concatenate([np.arange(had, had + most) for had, most in zip(counts, at_most, strict=True)])
        # One division of exact numbers: the same on every machine, and growing with the number within a source.
        order = np.lexsort((source, (number + 0.5) / self.shares[source]))[:count]
        return source[order], number[order]
