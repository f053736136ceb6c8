"""Build a Megatron-Core model from an architecture, for the kernels that this machine has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from prism_nemo.errors import InputError
from prism_nemo.models.decoder import Hybrid, LanguageModel, Transformer
from prism_nemo.models.family import Architecture, Mamba
from prism_nemo.models.layers.attention import SDPACoreAttention
from prism_nemo.models.layers.mlp import GatedMLP
from prism_nemo.models.layers.norm import RMSNorm
from prism_nemo.models.layers.rope import inverse_frequencies
from prism_nemo.models.layers.scaled import bias_dropout_add
from prism_nemo.models.layers.stack import hybrid_stack_spec
from prism_nemo.precision.check import megatron_fields
from prism_nemo.precision.linear import emulate_fp8
from prism_nemo.runtime import Runtime


def transformer_config(architecture: Architecture, runtime: Runtime, **overrides: Any) -> TransformerConfig:
    """Megatron's configuration for this architecture on this machine.

    Fusions that need Apex or Transformer Engine are on only where Transformer Engine is.
    ``cross_entropy_loss_fusion='native'`` stays off everywhere: it rounds gradients to bf16 even in fp32
    (fusions/fused_cross_entropy.py:82).
    """
    a, layout = architecture, runtime.parallel
    virtual = layout.virtual_pipeline_model_parallel_size
    values: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.kv_channels,
        "ffn_hidden_size": a.ffn_hidden_size,
        "gated_linear_unit": a.activation == "swiglu",
        "activation_func": F.silu if a.activation == "swiglu" else squared_relu,
        "softmax_scale": a.attention_multiplier,
        # Megatron counts positions to the left of the token, Hugging Face the token itself too.
        "window_size": None if a.sliding_window is None else (a.sliding_window - 1, 0),
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.norm_epsilon,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "context_parallel_size": layout.context_parallel_size,
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
        "overlap_p2p_comm": virtual > 1,
        # The loss arrives as a sum with its token count; finalize_model_grads divides by the global batch's tokens.
        "calculate_per_token_loss": True,
        **megatron_fields(runtime.precision),
    }
    if a.mamba is not None:
        values.update(
            is_hybrid_model=True,
            mamba_num_heads=a.mamba.heads,
            mamba_head_dim=a.mamba.head_dim,
            mamba_num_groups=a.mamba.groups,
            mamba_state_dim=a.mamba.state_size,
        )
    return TransformerConfig(**{**values, **overrides})


def _core_attention(architecture: Architecture) -> ModuleSpec:
    """Attention on torch's kernels, which rotates queries and keys itself."""
    rope = architecture.rope
    inv_freq = None if rope is None else inverse_frequencies(rope, architecture.kv_channels)
    return ModuleSpec(module=SDPACoreAttention, params={"inv_freq": inv_freq})


def _transformer_spec(
    architecture: Architecture, config: TransformerConfig, transformer_engine: bool, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers where it is installed; Megatron's local ones with torch kernels elsewhere.

    With context parallelism the core attention is ours everywhere: see `prism_nemo.models.layers.context_parallel`.
    """
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec()
        if config.context_parallel_size > 1:
            layer.submodules.self_attention.submodules.core_attention = _core_attention(architecture)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = _core_attention(architecture)
        layer.submodules.mlp.module = GatedMLP if architecture.activation == "swiglu" else MLP
    layer.submodules.self_attn_bda = bias_dropout_add(architecture.residual_multiplier)
    layer.submodules.mlp_bda = bias_dropout_add(architecture.residual_multiplier)
    if transformer_engine:
        return layer
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def _hybrid_spec(architecture: Architecture, mamba: Mamba, vp_stage: int | None) -> ModuleSpec:
    """Layers on torch kernels everywhere, with mamba_ssm's where they are installed.

    Transformer Engine's fused norm and projection takes no weight of another shape, which B and C of few groups need.
    """
    return hybrid_stack_spec(
        mixer={
            "conv_kernel": mamba.conv_kernel,
            "conv_bias": mamba.conv_bias,
            "chunk_size": mamba.chunk_size,
            "dt_limit": mamba.dt_limit,
        },
        norm_eps=architecture.norm_epsilon,
        core_attention=_core_attention(architecture),
        mlp=GatedMLP if architecture.activation == "swiglu" else MLP,
        bda=bias_dropout_add(architecture.residual_multiplier),
        vp_stage=vp_stage,
    )


def build_model(
    architecture: Architecture, runtime: Runtime, seq_length: int | None = None, **overrides: Any
) -> LanguageModel:
    """Build this rank's part of the model, on this rank's device.

    Args:
        architecture: What to build.
        runtime: Where.
        seq_length: Longest sequence; the architecture's own maximum if not given.
        overrides: Fields of Megatron's TransformerConfig.

    Raises:
        InputError: If the architecture cannot have the runtime's layout, or the layout has several parts on each stage.
    """
    if runtime.parallel.virtual_pipeline_model_parallel_size > 1:
        raise InputError(
            "parallel.virtual_pipeline_model_parallel_size: only mid-training runs a virtual pipeline; use 1"
        )
    return build_parts(architecture, runtime, seq_length, **overrides)[0]


def build_parts(
    architecture: Architecture, runtime: Runtime, seq_length: int | None = None, **overrides: Any
) -> list[LanguageModel]:
    """Build this rank's parts of the model: one, or as many as a virtual pipeline has on each stage.

    They share one configuration. Arguments and errors are those of `build_model`.
    """
    layout = runtime.parallel
    architecture.check_layout(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
    )
    config = transformer_config(architecture, runtime, **overrides)
    parts = layout.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if parts == 1 else list(range(parts))
    return [_build(architecture, runtime, config, seq_length, stage) for stage in stages]


def _build(
    architecture: Architecture,
    runtime: Runtime,
    config: TransformerConfig,
    seq_length: int | None,
    vp_stage: int | None,
) -> LanguageModel:
    """One part; `vp_stage` is None where there is no other."""
    tp = runtime.parallel.tensor_model_parallel_size
    common: dict[str, Any] = {
        "config": config,
        "vocab_size": architecture.padded_vocab_size(tp),
        "max_sequence_length": seq_length or architecture.max_position_embeddings,
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        "parallel_output": True,
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
    }
    model: LanguageModel
    if architecture.mamba is not None:
        spec = _hybrid_spec(architecture, architecture.mamba, vp_stage)
        model = Hybrid(architecture, mamba_stack_spec=spec, **common)
    else:
        te, rope = runtime.transformer_engine, architecture.rope
        rotates = te and config.context_parallel_size == 1  # else the core attention rotates queries and keys itself
        model = Transformer(
            architecture,
            transformer_layer_spec=_transformer_spec(architecture, config, te, vp_stage),
            position_embedding_type="rope" if rotates and rope is not None else "none",
            rotary_base=int(rope.theta) if rope is not None else 10000,
            vp_stage=vp_stage,
            **common,
        )
    if runtime.precision.fp8 == "emulate":
        emulate_fp8(model, runtime.precision)
    return model.to(runtime.device)
