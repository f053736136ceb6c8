"""The Nemotron-H family: Mamba-2, attention and squared-ReLU MLP layers in a pattern, without positions."""

from __future__ import annotations

from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.models import tables
from prism_nemo.models.family import Architecture, Family, Mamba, register
from prism_nemo.models.hf_config import HFConfig
from prism_nemo.models.weights import WeightMapping

_SYMBOLS = {
    "M": "M", "*": "*", "-": "-", "mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*",
    "mlp": "-",
}  # fmt: skip
# Keys of the initialisation, of kernels, of experts (there are none) and of positions (the class uses none);
# residual_in_fp32 is a matter of rounding, not of the function.
_HARMLESS = {
    "time_step_min", "time_step_max", "time_step_floor", "time_step_rank", "rescale_prenorm_residual", "expand",
    "num_logits_to_keep", "use_mamba_kernels", "mamba_ssm_cache_dtype", "n_routed_experts", "n_shared_experts",
    "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size", "moe_shared_expert_overlap",
    "num_experts_per_tok", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "output_router_logits",
    "mtp_layers_block_type", "mtp_hybrid_override_pattern", "rope_theta", "rope_parameters", "rope_scaling",
    "partial_rotary_factor", "is_hybrid_model", "residual_in_fp32",
}  # fmt: skip


def _read_pattern(config: HFConfig) -> str:
    """Kinds of layers from the published string or from the list that current releases of transformers write."""
    spellings = {key: config.get(key) for key in ("hybrid_override_pattern", "layers_block_type", "layer_types")}
    patterns = {}
    for key, kinds in spellings.items():
        if not kinds:
            continue
        unknown = sorted({str(k) for k in kinds} - set(_SYMBOLS)) if isinstance(kinds, (str, list)) else [str(kinds)]
        if unknown:
            raise InputError(
                f"{config.source}: {key} has layers of kind {unknown}, which the nemotron_h family does not support; "
                "supported: Mamba (M), attention (*) and MLP (-)"
            )
        patterns[key] = "".join(_SYMBOLS[kind] for kind in kinds)
    if len(set(patterns.values())) != 1:
        raise InputError(
            f"{config.source}: hybrid_override_pattern or layers_block_type must say what the layers are, once; found "
            f"{patterns or 'neither'}"
        )
    key, pattern = next(iter(patterns.items()))
    if config.size("num_hidden_layers", len(pattern)) != len(pattern):
        raise InputError(
            f"{config.source}: num_hidden_layers is {config.get('num_hidden_layers')}, but {key} has {len(pattern)} "
            "layers"
        )
    return pattern


class NemotronH(Family):
    """NemotronHForCausalLM without experts.

    The step size of the scan has no floor unless the file names a ``time_step_limit``: Megatron-Core, NVIDIA's own
    modeling code and vLLM have none. ``transformers`` 5.3 and later takes ``time_step_min``, a value of the
    initialisation, for one.
    """

    name = "nemotron_h"
    architectures = ("NemotronHForCausalLM",)
    # Published files, and what current releases of transformers write.
    prefixes = ("backbone", "model")

    def from_hf(self, config: dict[str, Any], source: str) -> Architecture:
        """See `Family.from_hf`."""
        read = HFConfig(config, source, self.name)
        for key, allowed in {
            "mlp_hidden_act": ("relu2",),
            "mamba_hidden_act": ("silu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "use_bias": (False,),
            "mamba_proj_bias": (False,),
            "attention_dropout": (0.0,),
            "hidden_dropout": (0.0,),
            "sliding_window": (),
            "num_nextn_predict_layers": (0,),
            "position_embedding_type": ("none",),
            "quantization_config": (),
        }.items():
            read.require(key, *allowed)
        pattern = _read_pattern(read)
        heads, hidden = read.size("num_attention_heads", 32), read.size("hidden_size")
        groups = read.size("num_key_value_heads", 8)
        mamba_heads, mamba_groups = read.size("mamba_num_heads", 128), read.size("n_groups", 8)
        for one, many, what in ((groups, heads, "num_key_value_heads"), (mamba_groups, mamba_heads, "n_groups")):
            if many % one:
                raise InputError(f"{source}: {what} {one} does not divide {many} heads")
        epsilon = read.number("layer_norm_epsilon", 1e-5)
        read.require("rms_norm_eps", epsilon)
        # attention_head_dim is the older name of head_dim; num_query_groups and hidden_act are others' names.
        old_head_dim = read.size("attention_head_dim", None)
        head_dim = read.size("head_dim", old_head_dim or 128)
        read.require("attention_head_dim", head_dim)
        read.require("num_query_groups", groups)
        read.require("hidden_act", "relu2")
        mamba = Mamba(
            heads=mamba_heads,
            head_dim=read.size("mamba_head_dim", 64),
            state_size=read.size("ssm_state_size", 128),
            groups=mamba_groups,
            conv_kernel=read.size("conv_kernel", 4),
            conv_bias=read.flag("use_conv_bias", True),
            chunk_size=read.size("chunk_size", 128),
            dt_limit=read.limit("time_step_limit"),
        )
        architecture = Architecture(
            family=self.name,
            vocab_size=read.size("vocab_size", 131072),
            hidden_size=hidden,
            ffn_hidden_size=read.size("intermediate_size", 21504),
            num_layers=len(pattern),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=head_dim,
            norm_epsilon=epsilon,
            tied_embeddings=read.flag("tie_word_embeddings", False),
            max_position_embeddings=read.size("max_position_embeddings", 4096),
            rope=None,
            activation="relu2",
            layer_pattern=pattern,
            mamba=mamba,
            hf_prefix="backbone",
            hf_config=dict(config),
        )
        read.finish(_HARMLESS)
        return architecture

    def weight_table(self, architecture: Architecture, tensor_model_parallel_size: int) -> list[WeightMapping]:
        """See `Family.weight_table`."""
        a, tp, prefix = architecture, tensor_model_parallel_size, architecture.hf_prefix
        hf = f"{prefix}.layers.{{layer}}."
        mamba, attention, mlp = (a.layers_of(kind) for kind in "M*-")
        mixer = f"{hf}mixer."
        return [
            tables.norm(a, "norm", f"{hf}norm", mamba),
            *tables.mixer(a, tp, mixer, mamba),
            tables.norm(a, "input_layernorm", f"{hf}norm", attention),
            *tables.attention(a, mixer, attention),
            tables.norm(a, "pre_mlp_layernorm", f"{hf}norm", mlp),
            *tables.mlp(a, (f"{mixer}up_proj",), f"{mixer}down_proj", mlp),
            *tables.vocabulary(a, tp, f"{prefix}.embeddings", "lm_head", f"{prefix}.norm_f"),
        ]


register(NemotronH())
