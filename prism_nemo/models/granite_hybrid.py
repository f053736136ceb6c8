"""The hybrid Granite family: Mamba-2 and attention layers, each followed by an MLP, with Granite's four scalars."""

from __future__ import annotations

from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.models import tables
from prism_nemo.models.family import Architecture, Family, Mamba, register
from prism_nemo.models.granite import (
    ATTENTION,
    GRANITE_4,
    HARMLESS_4,
    read_granite_4,
    read_positions,
    read_scalars,
)
from prism_nemo.models.hf_config import HFConfig
from prism_nemo.models.weights import WeightMapping


def _read_mamba(config: HFConfig, hidden: int) -> Mamba:
    config.require("mamba_proj_bias", False)
    heads, expand = config.size("mamba_n_heads", 128), config.size("mamba_expand", 2)
    d_head = config.get("mamba_d_head", "auto")
    head_dim = expand * hidden // heads if d_head in ("auto", None) else config.size("mamba_d_head")
    if heads * head_dim != expand * hidden:
        raise InputError(
            f"{config.source}: mamba_n_heads {heads} of mamba_d_head {head_dim} are not mamba_expand {expand} times "
            f"the hidden size {hidden}"
        )
    groups = config.size("mamba_n_groups", 1)
    if heads % groups:
        raise InputError(f"{config.source}: mamba_n_groups {groups} does not divide {heads} Mamba heads")
    return Mamba(
        heads=heads,
        head_dim=head_dim,
        state_size=config.size("mamba_d_state", 256),
        groups=groups,
        conv_kernel=config.size("mamba_d_conv", 4),
        conv_bias=config.flag("mamba_conv_bias", True),
        chunk_size=config.size("mamba_chunk_size", 256),
        dt_limit=config.limit("time_step_limit"),
    )


class GraniteHybrid(Family):
    """GraniteMoeHybridForCausalLM with Mamba layers and without experts.

    A Hugging Face layer is two of Megatron's: mixer or attention, then MLP.
    """

    name = "granite_hybrid"
    architectures = (GRANITE_4,)

    def claims(self, config: dict[str, Any]) -> bool:
        """Whatever is not attention only."""
        kinds = config.get("layer_types") or config.get("layers_block_type") or ["mamba"]
        return super().claims(config) and not (isinstance(kinds, list) and all(kind in ATTENTION for kind in kinds))

    def from_hf(self, config: dict[str, Any], source: str) -> Architecture:
        """See `Family.from_hf`."""
        read = HFConfig(config, source, self.name)
        fields, symbols = read_granite_4(read)
        rope, scalars = read_positions(read), read_scalars(read)
        mamba = _read_mamba(read, fields["hidden_size"])
        read.finish(HARMLESS_4)
        pattern = "".join(f"{symbol}-" for symbol in symbols)
        fields.update(num_layers=len(pattern), hf_config=dict(config))
        return Architecture(**fields, rope=rope, **scalars, layer_pattern=pattern, mamba=mamba)

    def weight_table(self, architecture: Architecture, tensor_model_parallel_size: int) -> list[WeightMapping]:
        """See `Family.weight_table`."""
        a, tp, hf = architecture, tensor_model_parallel_size, "model.layers.{layer}."
        mamba, attention, mlp = (a.layers_of(kind) for kind in "M*-")
        shared = f"{hf}shared_mlp."
        return [
            tables.norm(a, "norm", f"{hf}input_layernorm", mamba, block=2),
            *tables.mixer(a, tp, f"{hf}mamba.", mamba, block=2),
            tables.norm(a, "input_layernorm", f"{hf}input_layernorm", attention, block=2),
            *tables.attention(a, f"{hf}self_attn.", attention, block=2),
            tables.norm(a, "pre_mlp_layernorm", f"{hf}post_attention_layernorm", mlp, block=2),
            *tables.mlp(a, (f"{shared}input_linear",), f"{shared}output_linear", mlp, block=2),
            *tables.vocabulary(a, tp, "model.embed_tokens", "lm_head", "model.norm"),
        ]


register(GraniteHybrid())
