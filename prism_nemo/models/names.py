"""Parameter names: the weight tables use those of Megatron's local layer specs.

With Transformer Engine the norms before the two column-parallel layers are fused into them and carry other names; the
numbers are the same (megatron/core/models/gpt/gpt_layer_specs.py maps them alike for checkpoints).
"""

from __future__ import annotations

from collections.abc import Container

_FUSED_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


def actual_name(name: str, parameters: Container[str]) -> str:
    """The name under which a model has the parameter that a weight table calls `name`."""
    if name not in parameters:
        for local, fused in _FUSED_NORMS.items():
            if name.endswith(local):
                return name.removesuffix(local) + fused
    return name
