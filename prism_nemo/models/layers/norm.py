"""RMSNorm that knows sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm for Megatron specs.

    Megatron's WrappedTorchNorm refuses sequence parallelism (torch_norm.py:32). There each rank normalises its share of
    the sequence with the same weight, so the weight's gradient must be summed over tensor-parallel ranks: the attribute
    ``sequence_parallel`` asks ``finalize_model_grads`` to do it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]
