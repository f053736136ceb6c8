"""One mapping of every kind, for tests that hold for all of them."""

from __future__ import annotations

from prism_nemo.models.weights import (
    ColumnParallel,
    FusedQKV,
    GatedMLP,
    Replicated,
    RowParallel,
    VocabParallel,
    WeightMapping,
)


def every_kind(a: int, b: int, hidden: int, size: int) -> list[WeightMapping]:
    """Mappings of small tensors that `size` tensor-parallel ranks can share."""
    groups = a * size
    heads = groups * b
    return [
        Replicated("p", ("t",), (a, hidden), start=b),
        Replicated("p", ("t",), (a,), start=b),
        ColumnParallel("p", ("t",), (a * size + b * size, hidden), sections=((b * size, a * size), (0, b * size))),
        ColumnParallel("p", ("t",), (a * size,)),
        ColumnParallel("p", ("t",), (a * size, 1, b)),
        RowParallel("p", ("t",), (a, b * size)),
        VocabParallel("p", ("t",), (-(-b // size) * size, hidden), vocab_size=b),
        GatedMLP("p", ("g", "u"), (2 * a * size, hidden)),
        GatedMLP("p", ("gu",), (2 * a * size, hidden)),
        FusedQKV("p", ("q", "k", "v"), ((heads + 2 * groups) * 2, hidden), heads=heads, groups=groups, head_dim=2),
    ]
