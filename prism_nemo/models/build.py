"""Build a Megatron-Core model from an architecture, for the kernels that this machine has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from prism_nemo.models.family import Architecture
from prism_nemo.models.layers.attention import SDPACoreAttention
from prism_nemo.models.layers.cross_entropy import VocabParallelCrossEntropy
from prism_nemo.models.layers.mlp import GatedMLP
from prism_nemo.models.layers.norm import RMSNorm
from prism_nemo.models.layers.rope import inverse_frequencies
from prism_nemo.runtime import Runtime


class GPT(GPTModel):
    """GPTModel whose loss and logits never see the vocabulary's padding.

    The vocabulary is padded so that tensor-parallel ranks hold equal shares. Megatron leaves the padded logits in the
    softmax; for a converted model that adds exp(0) per padding row to the denominator and the loss is wrong without a
    word. Here they are set to the lowest number before the loss and before sampling.
    """

    def __init__(self, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.architecture = architecture
        if hasattr(self, "rotary_pos_emb"):
            rope = inverse_frequencies(architecture.rope, architecture.kv_channels)
            self.rotary_pos_emb.inv_freq = rope.to(self.rotary_pos_emb.inv_freq.device)
        if self.post_process:
            rows = self.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
            first = rows * parallel_state.get_tensor_model_parallel_rank()
            self._real_rows = max(0, min(rows, architecture.vocab_size - first))

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross entropy per token, [b, s], from this rank's logits [s, b, padded vocab / tp]."""
        logits = self.mask_padding(logits)
        if logits.dtype != torch.float32:
            return super().compute_language_model_loss(labels, logits)
        loss = VocabParallelCrossEntropy.apply(logits, labels.transpose(0, 1))
        return loss.transpose(0, 1).contiguous()

    def mask_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's padding rows set to the lowest finite number (minus infinity would give NaN grads)."""
        if logits.shape[-1] == self._real_rows:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= self._real_rows
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min)


def transformer_config(architecture: Architecture, runtime: Runtime, **overrides: Any) -> TransformerConfig:
    """Megatron's configuration for this architecture on this machine.

    Fusions that need Apex or Transformer Engine are on only where Transformer Engine is.
    ``cross_entropy_loss_fusion='native'`` stays off everywhere: it rounds gradients to bf16 even in fp32
    (fusions/fused_cross_entropy.py:82).
    """
    a, layout = architecture, runtime.parallel
    values: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.kv_channels,
        "ffn_hidden_size": a.ffn_hidden_size,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.norm_epsilon,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "sequence_parallel": layout.sequence_parallel,
        "params_dtype": runtime.dtype,
        "pipeline_dtype": runtime.dtype,
        "bf16": runtime.dtype == torch.bfloat16,
        "use_cpu_initialization": runtime.device.type == "cpu",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": runtime.transformer_engine,
        "bias_activation_fusion": runtime.transformer_engine,
        "apply_rope_fusion": runtime.transformer_engine,
        "persist_layer_norm": False,
        # With the default (True) and two stages, virtual pipelines pair sends and receives wrongly and train on it.
        "batch_p2p_comm": False,
        # The loss arrives as a sum with its token count; finalize_model_grads divides by the global batch's tokens.
        "calculate_per_token_loss": True,
    }
    return TransformerConfig(**{**values, **overrides})


def _layer_specs(
    architecture: Architecture, config: TransformerConfig, transformer_engine: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers where it is installed; Megatron's local ones with torch kernels elsewhere."""
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec()
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=SDPACoreAttention,
        params={"inv_freq": inverse_frequencies(architecture.rope, architecture.kv_channels)},
    )
    layer.submodules.mlp.module = GatedMLP
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def build_model(architecture: Architecture, runtime: Runtime, seq_length: int | None = None, **overrides: Any) -> GPT:
    """Build this rank's part of the model, on this rank's device.

    Args:
        architecture: What to build.
        runtime: Where.
        seq_length: Longest sequence; the architecture's own maximum if not given.
        overrides: Fields of Megatron's TransformerConfig.

    Raises:
        InputError: If the architecture cannot have the runtime's layout.
    """
    layout = runtime.parallel
    architecture.check_layout(layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
    config = transformer_config(architecture, runtime, **overrides)
    return GPT(
        architecture,
        config=config,
        transformer_layer_spec=_layer_specs(architecture, config, runtime.transformer_engine),
        vocab_size=architecture.padded_vocab_size(layout.tensor_model_parallel_size),
        max_sequence_length=seq_length or architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        # Without Transformer Engine the core attention rotates queries and keys itself.
        position_embedding_type="rope" if runtime.transformer_engine else "none",
        rotary_base=int(architecture.rope.theta),
    ).to(runtime.device)
