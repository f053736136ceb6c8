"""How many directions an update of a weight matrix has: its largest singular values and effective rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Columns beyond those asked for, and passes over the matrix (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, section
# 9.3): the values come out too small, by 3 % at most for noise, whose values lie closest together, else by far less.
_MORE = 10
_PASSES = 6
_EXACT = 256  # smaller side up to which all singular values are computed


@dataclass(frozen=True)
class Spectrum:
    """Singular values of an update b - a of one matrix.

    Attributes:
        values: The largest ones, in order.
        frobenius: Norm of the update.
        stable_rank: Squared Frobenius norm over squared largest value: 1 for a single direction.
        participation: (sum s^2)^2 / sum s^4: how many directions of equal strength would spread the energy as much.
        random_participation: What a Gaussian update of this shape has: m n / (m + n + 1) (expectation of both sums).
        energy: Share of the squared norm in `values`.
    """

    values: tuple[float, ...]
    frobenius: float
    stable_rank: float
    participation: float
    random_participation: float
    energy: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "values": list(self.values), "frobenius": self.frobenius, "stable_rank": self.stable_rank,
            "participation": self.participation, "random_participation": self.random_participation,
            "energy": self.energy,
        }  # fmt: skip


def spectrum_of(update: Tensor, count: int = 16, seed: int = 0) -> Spectrum | None:
    """The spectrum of an update.

    Where the smaller side has more than 256 entries the largest values come from a randomised factorisation (Halko et
    al. 2011), and sum s^4 = tr((U^T U)^2) is computed exactly from the smaller Gram matrix.

    Args:
        update: [m, n], any floating type.
        count: Singular values to give.
        seed: Of the random directions.

    Returns:
        None for an update of zeros.
    """
    u = update.float()
    square = float(u.double().square().sum())
    if square == 0:
        return None
    small = min(u.shape)
    if small <= _EXACT:
        values = torch.linalg.svdvals(u.double())
        fourth, values = float(values.pow(4).sum()), values[:count]
    else:
        values = _largest(u, count, seed)
        gram = u @ u.T if u.shape[0] <= u.shape[1] else u.T @ u
        fourth = float(gram.double().square().sum())
    rows, columns = u.shape
    return Spectrum(
        tuple(float(value) for value in values),
        square**0.5,
        square / float(values[0]) ** 2,
        square**2 / fourth,
        rows * columns / (rows + columns + 1),
        float(values.double().square().sum()) / square,
    )


def _largest(u: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = min(count + _MORE, min(u.shape))
    found = u @ torch.randn(u.shape[1], width, generator=generator)
    for _ in range(_PASSES):
        found = torch.linalg.qr(found).Q
        found = u @ (u.T @ found)
    basis = torch.linalg.qr(found).Q
    return torch.linalg.svdvals(basis.T @ u)[:count]
