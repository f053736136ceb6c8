"""The swap of tokens for heads and the cut of a batch; whole models are compared in test_packed_documents.py."""

from __future__ import annotations

import pytest
import torch
from context_workers import shares, swapped

from prism_nemo.errors import InputError
from prism_nemo.models.layers.context_parallel import repeats
from prism_nemo.runtime.launch import launch
from prism_nemo.training.midtrain import language_model_loss


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_gets_all_tokens_of_its_heads_and_gives_them_back(size: int) -> None:
    assert launch(swapped, size, processes=size) == [True] * 4


def test_groups_are_copied_where_they_are_fewer_than_ranks() -> None:
    assert [repeats(groups, 4) for groups in (1, 2, 4, 8)] == [4, 2, 1, 1]


def _batch(packed: bool) -> dict[str, torch.Tensor]:
    """Three rows of four tokens, of two sources."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "tokens": torch.arange(12).view(3, 4),
        "labels": torch.arange(1, 13).view(3, 4),
        "loss_mask": (torch.rand(3, 4, generator=generator) < 0.7).float(),
        "position_ids": torch.arange(4).expand(3, 4),
    }
    if packed:
        batch = {name: value.reshape(1, 12) for name, value in batch.items()}
        batch["cu_seqlens"] = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    return {
        **batch,
        "sources": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        "text_tokens": torch.tensor([4, 3, 2]),
        "flops": torch.tensor(7.0, dtype=torch.float64),
    }


@pytest.mark.parametrize("packed", [True, False])
def test_shares_add_up_to_the_batch(packed: bool) -> None:
    """Tokens once and in order; and all that is reported, whatever rows a share begins and ends in."""
    whole = _batch(packed)
    parts = launch(shares, whole, 2, processes=2)
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.cat([part[name] for part in parts], dim=1).equal(whole[name]), name
    if packed:
        assert all(part["cu_seqlens"].equal(whole["cu_seqlens"]) for part in parts)
    losses = torch.rand(whole["tokens"].shape, generator=torch.Generator().manual_seed(1))
    total, tokens, report = language_model_loss(whole, losses)
    pieces = [language_model_loss(part, x) for part, x in zip(parts, losses.chunk(2, dim=1), strict=True)]
    assert sum(piece[0] for piece in pieces) == pytest.approx(total)
    assert sum(piece[1] for piece in pieces) == tokens
    for name, value in report.items():
        assert sum(piece[2][name] for piece in pieces).tolist() == pytest.approx(value.tolist()), name


def test_rows_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(InputError, match="rows of 12 tokens cannot be shared by context_parallel_size 8 ranks"):
        launch(shares, _batch(True), 8, processes=8)
