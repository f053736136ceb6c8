"""Second opinions on how alike two representations are: the orthogonal Procrustes distance and mutual neighbours.

CKA is dominated by the directions of largest variance. Procrustes distance weighs directions by their length instead of
its square, and neighbours look at the arrangement of the rows alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def procrustes_distance(x: Tensor, y: Tensor) -> float:
    """Squared distance that is left after the best rotation, of centred rows scaled to unit Frobenius norm.

    ``||X||^2 + ||Y||^2 - 2 ||X^T Y||_*`` with the nuclear norm (Schoenemann 1966; as a measure of representations:
    Ding et al. 2021, arXiv 2108.01661, section 3).

    Args:
        x: [n, p], any floating type.
        y: [n, q], the same inputs in the same order.

    Returns:
        0 (equal up to rotation, shift and uniform scale) to 2 (nothing in common).

    Raises:
        ValueError: If the numbers of rows differ, or one of them has no spread.
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows, y has {len(y)}; both need the same inputs in the same order")
    grams = []
    for z in (x, y):
        z = z.detach().double()
        z = z - z.mean(dim=0)
        grams.append(z @ z.T)
    return procrustes_of_grams(*grams)


def procrustes_of_grams(k: Tensor, m: Tensor) -> float:
    """`procrustes_distance` from the centred Gram matrices of the rows.

    With K = U S^2 U^T the rows are U S in a basis of their own, and a rotation changes no singular value: n x n
    matrices do, however wide the rows are (800 rows of 5,120 features on a busy core: 2.6 s, where the singular values
    of the rows themselves took 18). Directions below rounding are left out; the result is exact to 1e-6.

    Args:
        k: [n, n] fp64, of centred rows.
        m: The same of the other model.

    Raises:
        ValueError: If one of them has no spread.
    """
    parts = []
    for name, gram in (("x", k), ("y", m)):
        trace = gram.trace()
        if not bool(trace > 0):
            raise ValueError(f"{name}: every feature is constant over the rows, so the distance is undefined")
        values, vectors = torch.linalg.eigh(gram / trace)
        real = values > len(gram) * torch.finfo(torch.float64).eps * values[-1]
        parts.append(vectors[:, real] * values[real].sqrt())
    nuclear = torch.linalg.svdvals(parts[0].T @ parts[1]).sum()
    return min(2.0, max(0.0, 2 - 2 * float(nuclear)))


def mutual_neighbours(x: Tensor, y: Tensor, k: int) -> float:
    """Mean share of a row's k nearest neighbours that are the same in both representations.

    As in Huh et al. 2024 (arXiv 2405.07987, appendix A): neighbours by cosine similarity, a row is not its own. For
    unrelated representations the expected value is k / (n - 1).

    Args:
        x: [n, p], any floating type.
        y: [n, q], the same inputs in the same order.
        k: At least 1, below n.

    Returns:
        0 to 1.

    Raises:
        ValueError: If the numbers of rows differ, or k is out of range.
    """
    n = len(x)
    if n != len(y):
        raise ValueError(f"x has {n} rows, y has {len(y)}; both need the same inputs in the same order")
    if not 1 <= k < n:
        raise ValueError(f"k: {k} neighbours of {n} rows; use 1 to {n - 1}")
    found = []
    for z in (x, y):
        z = torch.nn.functional.normalize(z.detach().double(), dim=1)
        near = torch.zeros(n, n, dtype=torch.bool, device=z.device)
        near.scatter_(1, (z @ z.T).fill_diagonal_(-torch.inf).topk(k, dim=1).indices, True)
        found.append(near)
    return float((found[0] & found[1]).sum()) / (n * k)
