"""Rotary embedding."""

from __future__ import annotations

import torch


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    start_positions: torch.Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    """Turns the two halves of a head by ``freqs``, [positions, 1, 1, d]; in the format "thd" each document from 0."""
    if interleaved or start_positions is not None or cp_size != 1:
        raise NotImplementedError
    if tensor_format == "thd":
        if cu_seqlens is None:
            raise ValueError("where the documents begin is not given")
        place = torch.cat([torch.arange(int(n)) for n in cu_seqlens.diff()])
        angles = freqs[place, 0]  # [t, 1, d]
    else:
        angles = freqs[: t.shape[0]]
    first, second = t.float().chunk(2, -1)
    return (t.float() * angles.cos() + torch.cat([-second, first], -1) * angles.sin()).to(t.dtype)


def apply_fused_qkv_rotary_pos_emb(*_: object, **__: object) -> torch.Tensor:
    raise NotImplementedError("only with fused_single_qkv_rope")
