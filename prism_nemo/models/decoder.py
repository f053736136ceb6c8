"""The two kinds of language model: a transformer, and a hybrid of Mamba, attention and MLP layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mamba.mamba_model import MambaModel

from prism_nemo.models.family import Architecture
from prism_nemo.models.layers.cross_entropy import VocabParallelCrossEntropy
from prism_nemo.models.layers.rope import inverse_frequencies
from prism_nemo.models.layers.scaled import ScaledEmbedding, ScaledOutputLayer


class LanguageModel(LanguageModule):
    """A Megatron model with its architecture, whose loss and logits never see the vocabulary's padding.

    The vocabulary is padded so that tensor-parallel ranks hold equal shares. Megatron leaves the padded logits in the
    softmax; for a converted model that adds exp(0) per padding row to the denominator and the loss is wrong without a
    word. Here they are set to the lowest number before the loss and before sampling.

    Attributes:
        architecture: What the model is.
        real_rows: Rows of this rank's output layer that are not padding (last pipeline stage only).
    """

    architecture: Architecture
    real_rows: int

    def complete(self, architecture: Architecture) -> None:
        """What Megatron's constructors have no argument for; called once, after them."""
        a = self.architecture = architecture
        if a.rope is not None and hasattr(self, "rotary_pos_emb"):
            rope = inverse_frequencies(a.rope, a.kv_channels)
            self.rotary_pos_emb.inv_freq = rope.to(self.rotary_pos_emb.inv_freq.device)
        if self.pre_process and a.embedding_multiplier != 1.0:
            ScaledEmbedding.wrap(self.embedding, a.embedding_multiplier)
        if self.post_process:
            if a.logits_scaling != 1.0:
                ScaledOutputLayer.wrap(self.output_layer, a.logits_scaling)
            rows = self.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
            first = rows * parallel_state.get_tensor_model_parallel_rank()
            self.real_rows = max(0, min(rows, a.vocab_size - first))

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross entropy per token, [b, s], from this rank's logits [s, b, padded vocab / tp]."""
        logits = self.mask_padding(logits)
        if logits.dtype != torch.float32:
            return super().compute_language_model_loss(labels, logits)
        loss = VocabParallelCrossEntropy.apply(logits, labels.transpose(0, 1))
        return loss.transpose(0, 1).contiguous()

    def mask_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's padding rows set to the lowest finite number (minus infinity would give NaN grads)."""
        if logits.shape[-1] == self.real_rows:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= self.real_rows
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min)


class Transformer(LanguageModel, GPTModel):
    """Attention and MLP in every layer."""

    def __init__(self, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.complete(architecture)


class Hybrid(LanguageModel, MambaModel):
    """Mamba, attention and MLP layers in the architecture's pattern."""

    def __init__(self, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(**kwargs, hybrid_override_pattern=architecture.layer_pattern)
        self.vp_stage = self.decoder.vp_stage
        self.complete(architecture)

    def setup_embeddings_and_output_layer(self) -> None:
        """As Megatron's, which asks which part of a virtual pipeline this is; MambaModel cannot be told."""
        self.vp_stage = self.decoder.vp_stage
        super().setup_embeddings_and_output_layer()
