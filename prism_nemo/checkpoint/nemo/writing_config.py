"""Our architectures as NeMo's model and configuration classes, or why NeMo has none for them.

Granite's four multipliers (of embeddings, attention, residual stream and logits) have no counterpart in NeMo's classes
nor in Megatron's configuration, so those families cannot be written: NeMo would load the weights and compute another
function.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from prism_nemo.checkpoint.nemo.io_json import Call, Symbol
from prism_nemo.checkpoint.nemo.tokenizer import HF_TOKENIZER, TOKENIZER_FOLDER
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture

_MODELS = "nemo.collections.llm.gpt.model."
_CONTEXT = "nemo.lightning.io.pl.TrainerContext"


def nemo_model(architecture: Architecture, dtype: torch.dtype, tokenizer: bool) -> Call:
    """The model, as NeMo would make it.

    Args:
        architecture: What to say.
        dtype: Of the weights.
        tokenizer: Whether the context holds tokenizer files.

    Raises:
        InputError: If no class of NeMo computes the same function.
    """
    a = architecture
    if a.family in ("granite", "granite_hybrid"):
        raise InputError(
            f"the {a.family} family cannot be written for NeMo: it has no class with Granite's multipliers, so the "
            "same weights would compute another function there. Export to Hugging Face instead (--format hf)"
        )
    values: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.kv_channels,
        "layernorm_epsilon": a.norm_epsilon,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "share_embeddings_and_output_weights": a.tied_embeddings,
        "seq_length": a.max_position_embeddings,
        "make_vocab_size_divisible_by": _divisor(a.vocab_size),
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": Symbol(str(dtype)),
        "pipeline_dtype": Symbol(str(dtype)),
    }
    if a.family == "nemotron_h":
        model, config, more = "ssm.MambaModel", "ssm.NemotronHConfigBase", _hybrid(a)
    elif a.family in ("llama", "mistral"):
        model, config, more = _transformer(a)
    else:
        raise InputError(f"the {a.family} family cannot be written for NeMo: no class of NeMo is known for it")
    arguments: dict[str, Any] = {"config": Call(_MODELS + config, values | more)}
    if tokenizer:
        arguments["tokenizer"] = Call(HF_TOKENIZER, {"pretrained_model_name": TOKENIZER_FOLDER, "use_fast": True})
    else:
        arguments["tokenizer"] = None
    return Call(_MODELS + model, arguments)


def trainer_context(model: Call) -> Call:
    """What NeMo keeps of a run; there was no trainer and there is nothing else."""
    return Call(_CONTEXT, {"model": model, "trainer": None, "extra": {}})


def _transformer(a: Architecture) -> tuple[str, str, dict[str, Any]]:
    rope, scaling = a.rope, (a.rope and a.rope.scaling) or {}
    scaled = a.attention_multiplier not in (None, a.kv_channels**-0.5) or a.residual_multiplier != 1.0
    if rope is None or scaled or a.embedding_multiplier != 1.0 or a.logits_scaling != 1.0 or a.activation != "swiglu":
        raise InputError(f"this {a.family} model has scalars or an activation that NeMo's {a.family} class does not")
    values: dict[str, Any] = {
        "gated_linear_unit": True,
        "activation_func": Symbol("torch.nn.functional.silu"),
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        # Whole, since Megatron raises an integer to powers; NeMo's own classes say so, too.
        "rotary_base": _whole(rope.theta),
        "vocab_size": a.vocab_size,
    }
    kind = scaling.get("rope_type")
    if kind == "linear":
        values["seq_len_interpolation_factor"] = scaling["factor"]
    if a.family == "mistral":
        if kind == "llama3":
            raise InputError("this mistral model has a llama3 rope_scaling, which NeMo has for its Llama classes only")
        window = a.sliding_window
        # Megatron counts positions to the left of the token, Hugging Face the token itself too. NeMo's default is a
        # window of [4096, 0], so that "none" has to be said.
        values["window_size"] = None if window is None else [window - 1, 0]
        values["cp_comm_type"] = None if window is None else "a2a"
        return "mistral.MistralModel", "mistral.MistralConfig7B", values
    if kind == "llama3":
        values |= {
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": int(scaling["original_max_position_embeddings"]),
        }
        return "llama.LlamaModel", "llama.Llama31Config", values
    return "llama.LlamaModel", "llama.LlamaConfig", values


def _hybrid(a: Architecture) -> dict[str, Any]:
    m = a.mamba
    if m is None or a.activation != "relu2":
        raise InputError("a nemotron_h model without Mamba mixers, or with another activation, has no class in NeMo")
    differing = {
        "a floor or a ceiling of the step size (time_step_limit)": m.dt_limit != (0.0, math.inf),
        "a convolution of another length than 4 (conv_kernel)": m.conv_kernel != 4,
        "a convolution without bias (use_conv_bias)": not m.conv_bias,
        "another epsilon than 1e-5, which Megatron's mixer has": a.norm_epsilon != 1e-5,
    }
    for what, differs in differing.items():
        if differs:
            raise InputError(
                f"this nemotron_h model has {what}; NeMo's MambaModel cannot be told, so it is not written"
            )
    return {
        "gated_linear_unit": False,
        # The class has a lambda here, which no file can say; this is the same function.
        "activation_func": Symbol("megatron.core.activations.squared_relu"),
        "position_embedding_type": "none",
        "hybrid_override_pattern": a.layer_pattern,
        "is_hybrid_model": True,
        "mamba_num_heads": m.heads,
        "mamba_head_dim": m.head_dim,
        "mamba_num_groups": m.groups,
        "mamba_state_dim": m.state_size,
        "vocab_size": a.vocab_size,
        "first_last_layers_bf16": False,
    }


def _divisor(vocab_size: int) -> int:
    """Largest power of two up to 128 that divides the vocabulary: NeMo adds no padding then, as after its imports."""
    return math.gcd(vocab_size, 128)


def _whole(theta: float) -> int:
    if theta != int(theta):
        raise InputError(f"rope_theta {theta} is no whole number, which NeMo's rotary_base has to be")
    return int(theta)
