"""Massive activations: the few dimensions of the residual stream that are far larger than all others.

Sun et al. 2024 (arXiv 2402.17762): a few dimensions, at a few tokens, reach some thousand times the median magnitude of
their hidden state, in the same dimensions for whatever input. They decide every norm, and with it CKA of raw states:
two models that share them look alike whatever else they compute. So they are listed, and CKA is also computed without
them and with every dimension scaled alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RAW, WITHOUT, STANDARDISED = "raw", "without_massive", "standardised"
TREATMENTS = (RAW, WITHOUT, STANDARDISED)
# Listed for each layer also where they are not massive, so that a reader sees what the largest ones are.
_LISTED = 5


class DimensionSizes:
    """How large each dimension of one layer's states gets, over any number of tokens; memory for one state.

    Attributes:
        tokens: Seen so far.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._largest = self._ratio = self._squares = torch.empty(0)

    def update(self, states: Tensor) -> None:
        """Take in states [tokens, hidden]."""
        size = states.detach().abs().double()
        # Of each token, as the definition says: "the median magnitude of its hidden state".
        middle = size.median(dim=1, keepdim=True).values.clamp(min=torch.finfo(torch.float64).tiny)
        largest, ratio, squares = size.amax(dim=0), (size / middle).amax(dim=0), size.square().sum(dim=0)
        if self.tokens:
            largest, ratio = torch.maximum(largest, self._largest), torch.maximum(ratio, self._ratio)
            squares = squares + self._squares
        self._largest, self._ratio, self._squares = largest, ratio, squares
        self.tokens += len(states)

    def to_cpu(self) -> None:
        """Bring what was gathered to the CPU, once, at the end."""
        self._largest, self._ratio, self._squares = self._largest.cpu(), self._ratio.cpu(), self._squares.cpu()

    def massive(self, ratio: float) -> list[int]:
        """Dimensions that at some token are at least `ratio` times the median magnitude of its state, in order."""
        return (self._ratio >= ratio).nonzero().flatten().tolist()

    def largest(self, ratio: float) -> list[dict[str, Any]]:
        """The massive dimensions, and the next largest up to five, the largest ratio first.

        Returns:
            For each ``dimension``, ``ratio`` (largest magnitude against the median of its state), ``magnitude`` (the
            largest), ``rms`` (over the tokens) and ``massive``.
        """
        count = min(len(self._ratio), max(_LISTED, len(self.massive(ratio))))
        return [
            {
                "dimension": place,
                "ratio": float(self._ratio[place]),
                "magnitude": float(self._largest[place]),
                "rms": float((self._squares[place] / self.tokens).sqrt()),
                "massive": bool(self._ratio[place] >= ratio),
            }
            for place in self._ratio.argsort(descending=True, stable=True)[:count].tolist()
        ]


@dataclass(frozen=True)
class Treated:
    """Rows [n, features] of both models, treated the same way."""

    first: Tensor
    second: Tensor


def treat(first: Tensor, second: Tensor, treatment: str, massive: tuple[list[int], list[int]]) -> Treated:
    """Prepare the rows of two models for a measure.

    Args:
        first: [n, p] of one model.
        second: [n, q] of the other.
        treatment: One of `TREATMENTS`. ``without_massive`` leaves out the dimensions that are massive in either model
            (in models of different width: each its own). ``standardised`` gives every dimension mean 0 and variance 1
            over the rows; one that is constant becomes 0. It is no full whitening, which would make any two
            representations of fewer rows than features alike.
        massive: The massive dimensions of each.
    """
    if treatment == WITHOUT:
        both = [set(massive[0]), set(massive[1])]
        if first.shape[1] == second.shape[1]:
            both = [both[0] | both[1]] * 2
        kept = [[i for i in range(z.shape[1]) if i not in own] for z, own in zip((first, second), both, strict=True)]
        return Treated(first[:, kept[0]], second[:, kept[1]])
    if treatment == STANDARDISED:
        return Treated(_standardised(first), _standardised(second))
    return Treated(first, second)


def _standardised(x: Tensor) -> Tensor:
    x = x.double()
    moved = x - x.mean(dim=0)
    constant = (x == x[0]).all(dim=0)
    return (moved / moved.square().mean(dim=0).sqrt().masked_fill(constant, 1.0)).masked_fill(constant, 0.0)
