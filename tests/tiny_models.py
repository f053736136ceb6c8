"""A tiny random model of every family, as a Hugging Face folder.

Every scalar is far from 1 and different from the others, query, key and value (and gate and up) differ in size or in
values, vocabularies are odd, a head is not hidden / heads wide, and no parameter sits at an initial 0 or 1: a scalar
dropped or a mapping swapped must show.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GraniteConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    PreTrainedConfig,
)
from transformers.models.auto import AutoModelForCausalLM

_DENSE: dict[str, Any] = {
    "vocab_size": 149,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_SCALARS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
    "logits_scaling": 1.7,
}
_GRANITE_4: dict[str, Any] = {
    **_DENSE,
    **_SCALARS,
    "intermediate_size": 72,  # not read by anyone: it belongs to experts
    "shared_intermediate_size": 80,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_HYBRID: dict[str, Any] = {
    **_GRANITE_4,
    **_MAMBA,
    "position_embedding_type": None,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
_NEMOTRON: dict[str, Any] = {
    "vocab_size": 149,
    "hidden_size": 48,
    "hybrid_override_pattern": "M-M*-MM-",
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 128,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "conv_kernel": 3,
    "chunk_size": 16,
    "initializer_range": 0.2,
}

# Name of a case -> configuration class and values.
CASES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**_DENSE, "head_dim": 20}),
    "llama-tied": (LlamaConfig, {**_DENSE, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, {**_DENSE, "head_dim": 20, "sliding_window": None}),
    "mistral-window": (MistralConfig, {**_DENSE, "head_dim": 20, "sliding_window": 7}),
    "granite": (GraniteConfig, {**_DENSE, **_SCALARS, "tie_word_embeddings": True}),
    "granite-4": (
        GraniteMoeHybridConfig,
        {**_GRANITE_4, "layer_types": ["full_attention"] * 4, "position_embedding_type": "rope",
         "tie_word_embeddings": True, "mamba_n_heads": 8, "mamba_d_head": 12},
    ),
    "granite-hybrid": (GraniteMoeHybridConfig, {**_HYBRID, "tie_word_embeddings": True}),
    "granite-hybrid-one-group": (GraniteMoeHybridConfig, {**_HYBRID, "mamba_n_groups": 1}),
    "granite-hybrid-rope": (GraniteMoeHybridConfig, {**_HYBRID, "position_embedding_type": "rope"}),
    "nemotron-h": (NemotronHConfig, _NEMOTRON),
    "nemotron-h-other-pattern": (NemotronHConfig, {**_NEMOTRON, "hybrid_override_pattern": "*-MM-*M-", "n_groups": 4}),
}  # fmt: skip


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 7) -> None:
    """Values for every parameter, such that each of them moves the logits."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        if name.endswith("dt_bias"):  # step sizes from 0.0005, below transformers' floor of 0.001, to 0.2
            low, high = math.log(0.0005), math.log(0.2)
            dt = torch.exp(torch.rand(shape, generator=g) * (high - low) + low)
            parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif name.endswith("A_log"):
            parameter.copy_(torch.log(1 + 15 * torch.rand(shape, generator=g)))
        elif name.endswith(".D") or "norm" in name:
            parameter.copy_(0.5 + torch.rand(shape, generator=g))
        elif "conv1d.weight" in name:
            parameter.copy_(0.5 * torch.randn(shape, generator=g))
        elif name.endswith("bias"):
            parameter.copy_(0.3 * torch.randn(shape, generator=g))
        else:
            parameter.copy_(0.15 * torch.randn(shape, generator=g))


def set_dt_limit(model: torch.nn.Module, limit: tuple[float, float] = (0.0, math.inf)) -> None:
    """Give every mixer of a transformers model this limit: Nemotron-H's has a floor that training had not."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = limit  # type: ignore[assignment]


def hf_model(folder: Path | str) -> torch.nn.Module:
    """The reference, in fp32 and with eager attention, Nemotron-H without its floor."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    set_dt_limit(model)
    return model


def save_tiny(case: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write the case's model, with changes to its configuration, to `folder`."""
    cls, values = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cls(**{**values, **changes}))
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    return folder
