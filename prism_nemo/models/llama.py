"""The Llama family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, no biases."""

from __future__ import annotations

from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, Family, Rope, register
from prism_nemo.models.weights import (
    FusedQKV,
    GatedMLP,
    Replicated,
    RowParallel,
    VocabParallel,
    WeightMapping,
)

# Keys that set sizes and are read below.
_SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
}
# Keys whose value must be this, because another value would be another function.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (False, None),
}
# Keys that do not change the function computed from the weights.
_HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp", "is_llama_config", "_name_or_path",
    "return_dict", "output_attentions", "output_hidden_states", "transformers.js_config", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "is_encoder_decoder", "task_specific_params", "tokenizer_class",
    "_attn_implementation", "unsloth_fixed",
}  # fmt: skip


def _rope(config: dict[str, Any], source: str) -> Rope:
    """Read the rotary embedding in its old (rope_theta, rope_scaling) and new (rope_parameters) spelling."""
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise InputError(f"{source}: {key} is {config[key]!r}; expected a mapping with a rope_type")
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    scaling = {k: v for k, v in scaling.items() if k not in ("rope_theta",)}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    known: dict[str, tuple[str, ...]] = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in known:
        raise InputError(
            f"{source}: rope_scaling of type '{kind}' is not supported; supported: {sorted(known)}. "
            "Ignoring it would give wrong positions silently"
        )
    missing = [key for key in known[kind] if key not in scaling]
    unknown = sorted(set(scaling) - set(known[kind]) - {"rope_type", "type"})
    if missing or unknown:
        raise InputError(f"{source}: rope_scaling of type '{kind}': missing {missing}, not understood {unknown}")
    if kind == "default":
        return Rope(theta=theta)
    return Rope(theta=theta, scaling={"rope_type": kind, **{k: float(scaling[k]) for k in known[kind]}})


class Llama(Family):
    """LlamaForCausalLM."""

    name = "llama"
    architectures = ("LlamaForCausalLM",)

    def from_hf(self, config: dict[str, Any], source: str) -> Architecture:
        """See `Family.from_hf`."""
        for key, allowed in _REQUIRED.items():
            if key in config and config[key] not in allowed:
                raise InputError(
                    f"{source}: {key} = {config[key]!r} is not supported by the llama family (only {allowed[0]!r}); "
                    "converting would give another function"
                )
        unknown = sorted(k for k in config if k not in _SIZES | set(_REQUIRED) | _HARMLESS and config[k] is not None)
        if unknown:
            raise InputError(
                f"{source}: key '{unknown[0]}' is not mapped by the llama family; if it does not change the function, "
                "add it to the harmless keys in prism_nemo/models/llama.py"
            )
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            architecture = Architecture(
                family=self.name,
                vocab_size=int(config["vocab_size"]),
                hidden_size=hidden,
                ffn_hidden_size=int(config["intermediate_size"]),
                num_layers=int(config["num_hidden_layers"]),
                num_attention_heads=heads,
                num_query_groups=int(config.get("num_key_value_heads") or heads),
                kv_channels=int(config.get("head_dim") or hidden // max(1, heads)),
                norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
                tied_embeddings=bool(config.get("tie_word_embeddings", False)),
                max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
                rope=_rope(config, source),
                hf_config=dict(config),
            )
        except KeyError as error:
            raise InputError(f"{source}: key {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{source}: a size is not a number: {error}") from error
        sizes = {
            "vocab_size": architecture.vocab_size, "hidden_size": hidden, "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads", heads), "head_dim": architecture.kv_channels,
            "num_hidden_layers": architecture.num_layers, "intermediate_size": architecture.ffn_hidden_size,
        }  # fmt: skip
        for key, size in sizes.items():
            if size is not None and int(size) < 1:
                raise InputError(f"{source}: {key} is {size}; it must be at least 1")
        if heads % architecture.num_query_groups:
            raise InputError(
                f"{source}: num_key_value_heads {architecture.num_query_groups} does not divide {heads} heads"
            )
        return architecture

    def weight_table(self, architecture: Architecture, padded_vocab_size: int) -> list[WeightMapping]:
        """See `Family.weight_table`."""
        a = architecture
        mg, hf = "decoder.layers.{layer}.", "model.layers.{layer}."
        attention, mlp = f"{hf}self_attn.", f"{hf}mlp."
        h, ffn, vocab = a.hidden_size, a.ffn_hidden_size, (padded_vocab_size, a.hidden_size)
        heads, groups, d = a.num_attention_heads, a.num_query_groups, a.kv_channels
        embed, head = "model.embed_tokens.weight", "lm_head.weight"
        table: list[WeightMapping] = [
            VocabParallel("embedding.word_embeddings.weight", (embed,), vocab, vocab_size=a.vocab_size),
            Replicated(f"{mg}input_layernorm.weight", (f"{hf}input_layernorm.weight",), (h,)),
            FusedQKV(
                f"{mg}self_attention.linear_qkv.weight",
                tuple(f"{attention}{x}_proj.weight" for x in "qkv"),
                ((heads + 2 * groups) * d, h),
                heads=heads,
                groups=groups,
                head_dim=d,
            ),
            RowParallel(f"{mg}self_attention.linear_proj.weight", (f"{attention}o_proj.weight",), (h, heads * d)),
            Replicated(f"{mg}pre_mlp_layernorm.weight", (f"{hf}post_attention_layernorm.weight",), (h,)),
            GatedMLP(f"{mg}mlp.linear_fc1.weight", (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), (2 * ffn, h)),
            RowParallel(f"{mg}mlp.linear_fc2.weight", (f"{mlp}down_proj.weight",), (h, ffn)),
            Replicated("decoder.final_layernorm.weight", ("model.norm.weight",), (h,)),
        ]
        if not a.tied_embeddings:
            table.append(VocabParallel("output_layer.weight", (head,), vocab, vocab_size=a.vocab_size))
        return table


register(Llama())
