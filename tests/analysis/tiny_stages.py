"""Tiny models that are stages of one another, and text for them; not with the workers, which need no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_llama import edited_copy
from tiny_training import build_data, write_llama


def moved_copy(source: Path, folder: Path, share: float, seed: int) -> Path:
    """A copy of a folder whose tensors have moved by `share` of their norm."""
    generator = torch.Generator().manual_seed(seed)

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(tensors):
            noise = torch.randn(tensors[name].shape, generator=generator)
            tensors[name] += share * tensors[name].norm() / noise.norm() * noise

    return edited_copy(source, folder, move)


def stages(root: Path, **changes: Any) -> tuple[list[Path], Path]:
    """Three models, each a random update away from the one before (the last one near), and built data."""
    data = build_data(root)
    base = write_llama(root / "base", std=0.2, max_position_embeddings=192, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((root / "tokenizer" / name).read_bytes())
    mid = moved_copy(base, root / "mid", 0.3, seed=1)
    return [base, mid, moved_copy(mid, root / "rl", 0.05, seed=2)], data
