"""Granite's scalars as modules: scaled embeddings, scaled logits, scaled additions to the residual stream.

They enter where the reference implementation applies them and stay out of the weights, so that an imported tensor is
the exported tensor, and the optimizer sees the parameters that Granite's authors trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec


class ScaledEmbedding(LanguageModelEmbedding):
    """Embeddings times ``embedding_multiplier``; a tied output layer reads the same weights unscaled."""

    multiplier: float

    @classmethod
    def wrap(cls, embedding: LanguageModelEmbedding, multiplier: float) -> None:
        """Make an embedding that Megatron's model has built a scaled one, in place: the model offers no spec for it."""
        embedding.__class__ = cls
        embedding.multiplier = multiplier

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[b, s] tokens -> [s, b, h]."""
        return super().forward(*args, **kwargs) * self.multiplier


class ScaledOutputLayer(ColumnParallelLinear):
    """Logits divided by ``logits_scaling``."""

    logits_scaling: float

    @classmethod
    def wrap(cls, layer: ColumnParallelLinear, logits_scaling: float) -> None:
        """Make an output layer that Megatron's model has built a scaled one, in place."""
        layer.__class__ = cls
        layer.logits_scaling = logits_scaling

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """[s, b, h] -> ([s, b, vocab / tp], bias)."""
        logits, bias = super().forward(*args, **kwargs)
        return logits / self.logits_scaling, bias


class ScaledBiasDropoutAdd:
    """residual + scale * dropout(x + bias), in the place of Megatron's bias-dropout-add.

    Args:
        scale: Granite's ``residual_multiplier``.
    """

    def __init__(self, scale: float, **_: Any) -> None:
        self.scale = scale

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function that a layer calls with ((x, bias), residual, dropout probability)."""
        add = get_bias_dropout_add(training, fused)

        def scaled(x_with_bias: tuple[torch.Tensor, Any], residual: torch.Tensor, prob: float) -> torch.Tensor:
            x, bias = x_with_bias
            if bias is None and not (training and prob > 0):
                return torch.add(residual, x, alpha=self.scale)
            total: torch.Tensor = add((x * self.scale, bias if bias is None else bias * self.scale), residual, prob)
            return total

        return scaled


def bias_dropout_add(residual_multiplier: float) -> Any:
    """The bda of a layer spec: Megatron's own where there is nothing to scale."""
    if residual_multiplier == 1.0:
        return get_bias_dropout_add
    return ModuleSpec(module=ScaledBiasDropoutAdd, params={"scale": residual_multiplier})
