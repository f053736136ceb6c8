"""Procrustes distance against the explicit best rotation, and mutual neighbours against a slow count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prism_nemo.analysis.alignment import mutual_neighbours, procrustes_distance


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    moved = x - x.mean(dim=0)
    return moved / moved.norm()


@pytest.mark.parametrize("n", [6, 50])  # fewer and more rows than features
def test_distance_is_what_the_best_rotation_leaves(n: int) -> None:
    x, y = normal(n, 8, seed=1), normal(n, 8, seed=2)
    a, b = unit(x), unit(y)
    u, _, v = torch.linalg.svd(b.T @ a)
    left = float((a - b @ (u @ v)).square().sum())
    found = procrustes_distance(x, y)
    assert found == pytest.approx(left, abs=1e-10)
    # No other rotation leaves less.
    others = [torch.linalg.qr(normal(8, 8, seed=s)).Q for s in range(20)]
    assert all(float((a - b @ q).square().sum()) > found for q in others)


def test_distance_invariances_and_ends() -> None:
    x = normal(20, 6, seed=3)
    rotation = torch.linalg.qr(normal(6, 6, seed=4)).Q
    assert procrustes_distance(x, 7 * x @ rotation + 2) == pytest.approx(0, abs=1e-10)
    stretched = x * torch.tensor([30.0, 1, 1, 1, 1, 1])
    assert procrustes_distance(x, stretched) > 0.1
    # Orthogonal columns of rows: nothing in common.
    columns = torch.linalg.qr(torch.cat((torch.ones(20, 1, dtype=torch.float64), normal(20, 4, seed=5)), dim=1)).Q[
        :, 1:
    ]
    assert procrustes_distance(columns[:, :2], columns[:, 2:]) == pytest.approx(2, abs=1e-10)


def test_neighbours_by_hand_and_by_a_slow_count() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 1.0, 1.1, 1.3], dtype=torch.float64)
    x = torch.stack((angles.cos(), angles.sin()), dim=1)
    lengths = torch.tensor([[1.0], [9.0], [2.0], [5.0], [1.0], [3.0]])
    assert mutual_neighbours(x, x * lengths, 1) == 1.0  # cosine: lengths do not count
    y = x[[0, 3, 1, 2, 4, 5]]  # rows of other texts
    assert mutual_neighbours(x, y, 1) < 1
    p, q, k = normal(30, 5, seed=6), normal(30, 7, seed=7), 4
    hits = 0
    for i in range(30):
        near = []
        for z in (p, q):
            cosine = [float(z[i] @ z[j] / (z[i].norm() * z[j].norm())) if i != j else -math.inf for j in range(30)]
            near.append(set(sorted(range(30), key=lambda j: -cosine[j])[:k]))
        hits += len(near[0] & near[1])
    assert mutual_neighbours(p, q, k) == pytest.approx(hits / (30 * k), abs=1e-12)


def test_unrelated_rows_share_as_many_neighbours_as_chance() -> None:
    found = [mutual_neighbours(normal(60, 9, seed=s), normal(60, 9, seed=100 + s), 6) for s in range(30)]
    # 30 sets of 60 rows with 6 neighbours each: standard error near sqrt(0.1 * 0.9 / 10,800) = 0.003.
    assert sum(found) / 30 == pytest.approx(6 / 59, abs=0.012)


def test_refusals() -> None:
    x = normal(5, 3, seed=0)
    with pytest.raises(ValueError, match="x has 5 rows"):
        procrustes_distance(x, x[:4])
    with pytest.raises(ValueError, match="y: every feature"):
        procrustes_distance(x, torch.ones(5, 2))
    with pytest.raises(ValueError, match="x has 5 rows"):
        mutual_neighbours(x, x[:4], 1)
    for k in (0, 5):
        with pytest.raises(ValueError, match="use 1 to 4"):
            mutual_neighbours(x, x, k)
