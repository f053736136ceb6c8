"""The Llama family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, no biases."""

from __future__ import annotations

from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.models import tables
from prism_nemo.models.family import Architecture, Family, register
from prism_nemo.models.hf_config import HFConfig
from prism_nemo.models.weights import WeightMapping


def read_decoder(config: HFConfig) -> dict[str, Any]:
    """Fields of an `Architecture` that Llama, Mistral and Granite spell alike.

    Raises:
        InputError: For a missing size, or a value that would be another function.
    """
    config.require("hidden_act", "silu")
    config.require("attention_bias", False)
    config.require("mlp_bias", False)
    config.require("quantization_config")
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    groups = config.size("num_key_value_heads", heads)
    if heads % groups:
        raise InputError(f"{config.source}: num_key_value_heads {groups} does not divide {heads} heads")
    return {
        "family": config.family,
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.size("intermediate_size"),
        "num_layers": config.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": config.size("head_dim", None) or max(1, hidden // heads),
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        "max_position_embeddings": config.size("max_position_embeddings", 2048),
        "hf_config": dict(config.values),
    }


def dense_table(
    a: Architecture, tp: int, up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj"), down: str = "mlp.down_proj"
) -> list[WeightMapping]:
    """Weight table of a transformer with Llama's tensor names; `up` and `down` are those of the MLP."""
    hf, layers = "model.layers.{layer}.", tuple(range(a.num_layers))
    return [
        tables.norm(a, "input_layernorm", f"{hf}input_layernorm", layers),
        *tables.attention(a, f"{hf}self_attn.", layers),
        tables.norm(a, "pre_mlp_layernorm", f"{hf}post_attention_layernorm", layers),
        *tables.mlp(a, tuple(f"{hf}{name}" for name in up), f"{hf}{down}", layers),
        *tables.vocabulary(a, tp, "model.embed_tokens", "lm_head", "model.norm"),
    ]


class Llama(Family):
    """LlamaForCausalLM."""

    name = "llama"
    architectures = ("LlamaForCausalLM",)

    def from_hf(self, config: dict[str, Any], source: str) -> Architecture:
        """See `Family.from_hf`."""
        read = HFConfig(config, source, self.name)
        for key, allowed in {
            "attention_dropout": (0.0,),
            "sliding_window": (),
            "partial_rotary_factor": (1.0,),
            "rope_interleaved": (False,),
        }.items():
            read.require(key, *allowed)
        fields = read_decoder(read)
        rope = read.rope()
        read.finish()
        return Architecture(**fields, rope=rope)

    def weight_table(self, architecture: Architecture, tensor_model_parallel_size: int) -> list[WeightMapping]:
        """See `Family.weight_table`."""
        return dense_table(architecture, tensor_model_parallel_size)


register(Llama())
