"""Where the tokens of a pass stand: computed once and read by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Prompts:
    """Prompts that are read together, padded on the right, where causal attention never looks.

    Attributes:
        lengths: [b].
        real: [b, t, 1], whether a place holds a token.
        cos: [t, 1, 1, d / 2], or None without rotary embedding.
        sin: The same.
    """

    lengths: torch.Tensor
    real: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None


@dataclass
class Band:
    """Rows first..end of the cache, of similar length, whose queries look at the same columns.

    Attributes:
        first: First row.
        end: Last row plus one.
        start: First column that any of them sees.
        stop: Last column plus one.
        mask: [rows, 1, 1, columns] to add to the scores, or None where all see all.
    """

    first: int
    end: int
    start: int
    stop: int
    mask: torch.Tensor | None


@dataclass
class Step:
    """One more token for each of the first `rows` rows of the cache.

    Attributes:
        rows: How many.
        positions: [rows], where each stands in its response.
        bands: Rows of similar length, for attention in torch's kernels.
        angles: Cosines and sines of all positions, [positions, 1, 1, d / 2] each; None without rotary embedding.
    """

    rows: int
    positions: torch.Tensor
    bands: list[Band]
    angles: tuple[torch.Tensor, torch.Tensor] | None

    def rotation(self) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Cosines and sines of the rows, [rows, 1, 1, d / 2] each."""
        return (None, None) if self.angles is None else (self.angles[0][self.positions], self.angles[1][self.positions])


def bands_of(positions: list[int], size: int, window: int | None, like: torch.Tensor) -> list[Band]:
    """Cut rows into bands of `size`.

    Args:
        positions: Of the token that each row adds.
        size: Rows of a band.
        window: Positions that a token sees, itself included; None for all before it.
        like: Gives the masks' type and device.
    """
    bands = []
    for first in range(0, len(positions), size):
        own = positions[first : first + size]
        shortest, longest = min(own), max(own)
        start = 0 if window is None else max(0, shortest - window + 1)
        mask = None
        if shortest < longest:
            columns = torch.arange(start, longest + 1, device=like.device)
            here = torch.tensor(own, device=like.device).unsqueeze(-1)
            hidden = columns > here
            if window is not None:
                hidden |= columns <= here - window
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
        bands.append(Band(first, first + len(own), start, longest + 1, mask))
    return bands
