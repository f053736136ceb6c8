"""What all layers share."""

from __future__ import annotations

import torch


class TransformerEngineBaseModule(torch.nn.Module):
    """Has an extra state in its state dict, which is empty without FP8."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None and state.numel():
            raise ValueError("the stand-in has no FP8 state")


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    raise NotImplementedError("only with fused accumulation of gradients")
