"""Fields of NeMo's configurations, by what they mean for the function that a model computes.

A field of which this module knows nothing is refused unless it is off: NeMo's and Megatron's later releases add fields,
and one that changes the function and is dropped would give another model without a word.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from prism_nemo.checkpoint.nemo.io_json import Call, Opaque, Symbol

# Read by `prism_nemo.checkpoint.nemo.reading_config`.
READ = {
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "layernorm_epsilon", "share_embeddings_and_output_weights", "seq_length", "rotary_base", "vocab_size",
    "seq_len_interpolation_factor", "scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len",
    "window_size", "params_dtype", "position_embedding_type", "hybrid_override_pattern", "mamba_num_heads",
    "mamba_head_dim", "mamba_num_groups", "mamba_state_dim", "activation_func", "gated_linear_unit",
}  # fmt: skip

# Fields that change the function, with the only values that the supported families have.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "layernorm_zero_centered_gamma": (False,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "num_moe_experts": (None,),
    "multi_latent_attention": (False,),
    "window_attn_skip_freq": (None,),
    "no_rope_freq": (None,),
    "nope_layer_interval": (None,),
    "attention_chunk_size": (None,),
    "rope_scaling": (False, None),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "mtp_num_layers": (None, 0),
    "mrope_section": (None,),
    "heterogeneous_block_specs": (False,),
    "quant_recipe": (None,),
    "fp4_param": (False,),
    "hybrid_attention_ratio": (0.0,),
    "hybrid_mlp_ratio": (0.0,),
    "use_kitchen": (False,),
    # Its parameters have other names; the layers are the same, but a checkpoint of them has to be renamed by NeMo.
    "use_transformer_engine_full_layer_spec": (False,),
}

# Of NeMo's own configurations: training, placement, rounding, and where things come from.
_HARMLESS = {
    "fp16_lm_cross_entropy", "parallel_output", "make_vocab_size_divisible_by", "masked_softmax_fusion",
    "cross_entropy_loss_fusion", "gradient_accumulation_fusion", "deallocate_pipeline_outputs",
    "scatter_embedding_sequence_parallel", "tp_only_amax_red", "forward_step_fn", "data_step_fn", "generation_config",
    "tp_comm_overlap_cfg", "use_transformer_engine_op_fuser", "attention_backend", "get_attention_mask_from_fusion",
    "vocab_file", "tokenizer_model_path", "tokenizer_library", "tokenizer_name", "mapping_type", "post_process",
    "pre_process", "bias_dropout_fusion", "apply_rope_fusion", "init_method", "hybrid_override_pattern",
    "expert_tensor_parallel_size", "recompute_modules",
}  # fmt: skip

# Layers by name: these have the parameters and the function that Megatron's checkpoints of GPT and Mamba models have.
_SPECS = {
    "transformer_layer_spec": {"default_layer_spec", "transformer_engine_layer_spec", "local_layer_spec"},
    # NeMo writes an object of which only the class is left; its parameters are checked by their names.
    "mamba_stack_spec": {"ModuleSpec"},
}


@functools.cache
def _megatron_fields() -> frozenset[str]:
    """Fields of the Megatron configuration of this installation; those that change the function are in `REQUIRED`."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    latent = {field.name for field in dataclasses.fields(MLATransformerConfig)} - names
    return frozenset(names - latent)


def short(value: Any) -> str:
    """Last part of the name of a function or class, in whatever way the context gives it."""
    name = value.name if isinstance(value, Symbol) else value.target if isinstance(value, Call) else ""
    if isinstance(value, Opaque):
        name = value.kind
    return name.rsplit(".", 1)[-1]


def problem(key: str, value: Any) -> str:
    """Why a field cannot be converted; empty if it can."""
    if key in REQUIRED:
        if value in REQUIRED[key]:
            return ""
        return f"{key} = {value!r} is not supported (only {REQUIRED[key][0]!r}); converting would give another function"
    if key in _SPECS:
        known = short(value)
        if known in _SPECS[key]:
            return ""
        return f"{key} is {known or repr(value)}, layers that are not known here; known: {sorted(_SPECS[key])}"
    if key in READ or key in _HARMLESS or key in _megatron_fields() or value in (None, False, "", []):
        return ""
    return f"the field {key} = {value!r} is not known here; it may change the function"
