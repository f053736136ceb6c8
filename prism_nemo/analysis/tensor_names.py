"""What part of a model the name of a Hugging Face tensor means, for the supported families."""

from __future__ import annotations

import re

HEAD = "lm_head.weight"

# Module name -> (coarse group, component). The head is grouped with the embedding, as in Table 23.
_MODULES: dict[str, tuple[str, str]] = {
    "q_proj": ("attention", "attention.q"),
    "k_proj": ("attention", "attention.k"),
    "v_proj": ("attention", "attention.v"),
    "o_proj": ("attention", "attention.o"),
    "qkv_proj": ("attention", "attention.qkv"),
    "gate_proj": ("mlp", "mlp.gate"),
    "up_proj": ("mlp", "mlp.up"),
    "down_proj": ("mlp", "mlp.down"),
    "gate_up_proj": ("mlp", "mlp.gate_up"),
    "input_linear": ("mlp", "mlp.gate_up"),  # Granite 4: gate and up in one matrix
    "output_linear": ("mlp", "mlp.down"),
    "gate": ("mlp", "mlp.router"),
    "in_proj": ("mamba", "mamba.in_proj"),
    "out_proj": ("mamba", "mamba.out_proj"),
    "conv1d": ("mamba", "mamba.conv1d"),
    "A_log": ("mamba", "mamba.a_dt"),
    "dt_bias": ("mamba", "mamba.a_dt"),
    "D": ("mamba", "mamba.d"),
    "embed_tokens": ("embedding", "embedding"),
    "embeddings": ("embedding", "embedding"),  # Nemotron-H
    "lm_head": ("embedding", "head"),
}


def component_of(name: str) -> tuple[str, str]:
    """Coarse group and component of a Hugging Face tensor name.

    Returns:
        For example `("attention", "attention.q")`. The groups are attention, mlp, mamba, embedding (with the head),
        norm and other; the gated norm inside a Mamba mixer is a norm. A bias belongs to the component of its matrix.
    """
    parts = name.split(".")
    module = parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
    if "norm" in module or module.startswith("ln_"):
        return "norm", "norm"
    group, component = _MODULES.get(module, ("other", "other"))
    if group == "mamba" and "attn" in name:  # some families call the attention output `out_proj` too
        return "attention", "attention.o" if module == "out_proj" else "attention.qkv"
    return group, component


def layer_of(name: str) -> str | None:
    """Layer index in a Hugging Face tensor name, as the string that the JSON form uses; None outside the layers."""
    match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    return match[1] if match else None
