"""The dense Granite family: Llama's layers with four scalars.

GraniteForCausalLM (Granite 3) and those GraniteMoeHybridForCausalLM that have attention in every layer and no experts
(Granite 4.0 Micro), whose gate and up projections are one tensor.
"""

from __future__ import annotations

from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, Family, Rope, register
from prism_nemo.models.hf_config import HFConfig
from prism_nemo.models.llama import dense_table, read_decoder
from prism_nemo.models.weights import WeightMapping

GRANITE_4 = "GraniteMoeHybridForCausalLM"
# The names in published files, and those of current releases of transformers.
ATTENTION, MAMBA = ("attention", "full_attention"), ("mamba", "linear_attention")
# Keys of Granite 4 that concern experts, where there are none, and the initialisation.
HARMLESS_4 = {
    "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef", "init_method", "embedding_initializer_range",
    "normalization_function_eps", "layer_norm_eps", "logits_to_keep", "attention_dropout",
}  # fmt: skip
MAMBA_KEYS = {
    "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand",
    "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit",
}  # fmt: skip


def read_scalars(config: HFConfig) -> dict[str, Any]:
    """The four scalars; each is 1 where a file does not name it.

    They stay what they are and are never multiplied into weights: folding changes what the optimizer and any analysis
    of the weights see (measured: a down projection moved 4.4 times as far), and cannot be undone bit for bit.
    """
    return {
        key: config.number(key, 1.0)
        for key in ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling")
    }


def read_granite_4(config: HFConfig) -> tuple[dict[str, Any], list[str]]:
    """Fields of a Granite 4 without experts, and the kind of each of its layers, "M" or "*".

    Raises:
        InputError: For experts, or a value that is not represented.
    """
    experts = config.get("num_local_experts", 8)  # the class's own default
    if experts:
        raise InputError(f"{config.source}: num_local_experts is {experts}; mixtures of experts are not supported")
    config.require("normalization_function", "rmsnorm")
    width = config.size("shared_intermediate_size", 1024)
    # The class ignores intermediate_size, which belongs to experts.
    config.values = {**config.values, "intermediate_size": width}
    fields = read_decoder(config)
    one, other = config.get("layer_types"), config.get("layers_block_type")
    kinds = one or other or ["mamba"] * fields["num_layers"]
    if not isinstance(kinds, list) or (one and other and one != other):
        raise InputError(
            f"{config.source}: layer_types {one} and layers_block_type {other} must be lists that do not contradict"
        )
    symbols = ["*" if kind in ATTENTION else "M" if kind in MAMBA else "?" for kind in kinds]
    if "?" in symbols or len(symbols) != fields["num_layers"]:
        raise InputError(
            f"{config.source}: layer_types has {len(kinds)} entries {sorted(set(map(str, kinds)))}; expected "
            f"{fields['num_layers']} of {[*ATTENTION, *MAMBA]}"
        )
    return fields, symbols


def read_positions(config: HFConfig) -> Rope | None:
    """Granite 4 has positions only where the file says "rope"."""
    rope = config.rope()
    kind = config.get("position_embedding_type")
    if kind not in (None, "nope", "rope"):
        raise InputError(f"{config.source}: position_embedding_type is {kind!r}; expected 'rope', 'nope' or null")
    return rope if kind == "rope" else None


class Granite(Family):
    """GraniteForCausalLM, and GraniteMoeHybridForCausalLM with attention only."""

    name = "granite"
    architectures = ("GraniteForCausalLM", GRANITE_4)

    def claims(self, config: dict[str, Any]) -> bool:
        """Granite 4 is ours if every layer is attention."""
        if (config.get("architectures") or [None])[0] != GRANITE_4:
            return super().claims(config)
        kinds = config.get("layer_types") or config.get("layers_block_type") or ["mamba"]
        return isinstance(kinds, list) and all(kind in ATTENTION for kind in kinds)

    def from_hf(self, config: dict[str, Any], source: str) -> Architecture:
        """See `Family.from_hf`."""
        read = HFConfig(config, source, self.name)
        rope: Rope | None
        if config["architectures"][0] == GRANITE_4:
            fields, _ = read_granite_4(read)
            rope = read_positions(read)
            harmless = HARMLESS_4 | MAMBA_KEYS
        else:
            fields = read_decoder(read)
            rope = read.rope()
            # Some files have a dropout of 0.1 from pre-training; without effect on what the weights compute.
            harmless = {"attention_dropout"}
        scalars = read_scalars(read)
        read.finish(harmless)
        return Architecture(**{**fields, "hf_config": dict(config)}, rope=rope, **scalars)

    def weight_table(self, architecture: Architecture, tensor_model_parallel_size: int) -> list[WeightMapping]:
        """See `Family.weight_table`."""
        a, tp = architecture, tensor_model_parallel_size
        if a.hf_config["architectures"][0] != GRANITE_4:
            return dense_table(a, tp)
        return dense_table(a, tp, ("shared_mlp.input_linear",), "shared_mlp.output_linear")


register(Granite())
