"""What a precision can be together with: refused before processes start, not on the first GPU hour.

Megatron-Core 0.16.1 takes any ``fp8_recipe`` and, without Transformer Engine, trains without FP8 and without a word
(fp8_utils.py:658: no recipe, no context).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from prism_nemo.config import ParallelConfig, PrecisionConfig, RecomputeConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture
from prism_nemo.runtime import cuda

_CHOICES = {
    "dtype": (None, "fp32", "bf16"),
    "fp8": ("off", "on", "emulate"),
    "fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "fp8_format": ("hybrid", "e4m3"),
    "fp8_amax_compute_algo": ("most_recent", "max"),
}

# Compute capabilities with the recipe's matrix products, [from, to), and how people know them. Sources: Transformer
# Engine's pytorch/quantization.py, check_fp8_support, check_fp8_block_scaling_support, check_mxfp8_support.
_GPUS = {
    "delayed": ((8, 9), (99, 0), "an Ada, Hopper or Blackwell GPU"),
    "tensorwise": ((8, 9), (99, 0), "an Ada, Hopper or Blackwell GPU"),
    "blockwise": ((9, 0), (10, 0), "a Hopper GPU (H100, H200)"),
    "mxfp8": ((10, 0), (12, 0), "a Blackwell GPU (B200)"),
}

# Settings that only some others make use of.
_OF_FP8 = ("fp8_recipe", "fp8_format", "first_last_layers_bf16")
_OF_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
_OF_LAYERS_IN_BF16 = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")

_EMULATE = "precision.fp8=emulate measures the recipe's effect on the loss on any machine"


def recipes_of(capability: tuple[int, int]) -> list[str]:
    """Recipes that a GPU of this compute capability has."""
    return [recipe for recipe, (lowest, above, _) in _GPUS.items() if lowest <= capability < above]


def check_recomputation(precision: PrecisionConfig, granularity: str | None, modules: Iterable[str]) -> None:
    """Refuse to recompute linear layers whose scales have moved since: the recipes without memory may be recomputed.

    Args:
        precision: What was asked for.
        granularity: ``full``, ``selective`` or neither.
        modules: Parts of a layer that are recomputed with ``selective``.

    Raises:
        InputError: Naming what works.
    """
    linear = granularity == "full" or (granularity == "selective" and "mlp" in modules)
    if linear and precision.fp8 == "emulate" and precision.fp8_recipe == "delayed":
        raise InputError(
            "precision.fp8_recipe: delayed scales move between a forward pass and its recomputation, so emulation "
            "would take gradients of another function; choose tensorwise, blockwise or mxfp8, or do not recompute "
            "linear layers (recompute.granularity=none)"
        )


def check_precision(
    precision: PrecisionConfig,
    architecture: Architecture,
    layout: ParallelConfig,
    distributed_optimizer: bool,
    recompute: RecomputeConfig,
) -> None:
    """Refuse a precision that this machine, model or layout cannot have.

    Args:
        precision: What was asked for.
        architecture: Of the model.
        layout: Of the run.
        distributed_optimizer: Whether the optimizer is sharded.
        recompute: What is recomputed.

    Raises:
        InputError: Naming the key, and what would work.
    """
    check_precision_values(precision, architecture, layout, distributed_optimizer, recompute)
    if precision.fp8 == "on":
        _check_transformer_engine(precision, architecture, layout)


def check_precision_values(
    precision: PrecisionConfig,
    architecture: Architecture,
    layout: ParallelConfig,
    distributed_optimizer: bool,
    recompute: RecomputeConfig,
) -> None:
    """The part of `check_precision` that asks nothing of this machine; `check_fp8_on` has the rest.

    Raises:
        InputError: Naming the key, and what would work.
    """
    _check_values(precision, architecture, layout)
    check_recomputation(precision, recompute.granularity, recompute.modules)
    if precision.fp8_param_gather and precision.fp8 != "on":
        raise InputError(
            f"precision.fp8_param_gather needs precision.fp8=on, not {precision.fp8}: it is done by Transformer Engine"
        )
    if precision.fp8_param_gather and not distributed_optimizer:
        raise InputError(
            "precision.fp8_param_gather needs use_distributed_optimizer, which holds the fp32 master weights"
        )


def _check_values(precision: PrecisionConfig, architecture: Architecture, layout: ParallelConfig) -> None:
    for key, choices in _CHOICES.items():
        value = getattr(precision, key)
        if value not in choices:
            known = [str(choice) for choice in choices if choice is not None]
            near = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.4)
            advice = f"did you mean '{near[0]}'? " if near else ""
            raise InputError(f"precision.{key}: '{value}' is unknown; {advice}choose one of {', '.join(known)}")
    if precision.fp8_amax_history_len < 1:
        raise InputError(f"precision.fp8_amax_history_len: {precision.fp8_amax_history_len} must be at least 1")
    _refuse_without_effect(precision)
    if not precision.first_last_layers_bf16:
        return
    if precision.fp8_recipe == "delayed":
        raise InputError(
            "precision.first_last_layers_bf16: the delayed recipe cannot leave layers out (Megatron-Core enters it "
            "once for all layers); choose fp8_recipe tensorwise, blockwise or mxfp8"
        )
    most = architecture.num_layers // layout.pipeline_model_parallel_size
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if not 0 <= getattr(precision, key) <= most:
            raise InputError(
                f"precision.{key}: {getattr(precision, key)} is not between 0 and {most}, a pipeline stage's layers"
            )


def _refuse_without_effect(precision: PrecisionConfig) -> None:
    """A recipe without FP8 would be trained in bf16, and look like a measurement of the recipe."""
    refused: dict[str, str] = {}
    if not precision.first_last_layers_bf16:
        refused |= dict.fromkeys(_OF_LAYERS_IN_BF16, "without precision.first_last_layers_bf16=true")
    if precision.fp8_recipe != "delayed":
        refused |= dict.fromkeys(_OF_DELAYED, f"with precision.fp8_recipe={precision.fp8_recipe}")
    if precision.fp8 == "off":
        refused |= dict.fromkeys(_OF_FP8 + _OF_DELAYED, "with precision.fp8=off")
    default = PrecisionConfig()
    for key, why in refused.items():
        value, usual = getattr(precision, key), getattr(default, key)
        if value != usual:
            raise InputError(f"precision.{key}: {value} has no effect {why}; change that, or leave this at {usual}")


def check_fp8_on(
    precision: PrecisionConfig, architecture: Architecture, layout: ParallelConfig, capability: tuple[int, int] | None
) -> None:
    """Refuse FP8 of Transformer Engine that a model, or a GPU of this compute capability, cannot have.

    Asks nothing of the machine that it runs on, so that a plan can ask for another.

    Raises:
        InputError: Naming the key, and what would work.
    """
    _check_kind(precision, architecture)
    lowest, above, name = _GPUS[precision.fp8_recipe]
    if capability is None or not lowest <= capability < above:
        fitting = recipes_of(capability) if capability is not None else []
        raise InputError(
            f"precision.fp8_recipe: {precision.fp8_recipe} needs {name}; this one has compute capability "
            f"{'.'.join(map(str, capability or ()))}, which has {' and '.join(fitting) or 'no FP8'}"
        )
    if precision.fp8_param_gather and precision.fp8_recipe == "mxfp8":
        raise InputError(
            "precision.fp8_param_gather: with mxfp8 Megatron-Core gathers weights through the gradients' memory, only "
            "with overlapped communication, which is not used here; leave it off"
        )
    check_fp8_sizes(precision.fp8_recipe, architecture, layout)


def check_fp8_sizes(recipe: str, architecture: Architecture, layout: ParallelConfig) -> None:
    """Refuse sizes that FP8 products cannot have.

    Raises:
        InputError: Naming the size.
    """
    multiple = 32 if recipe == "mxfp8" else 16
    tp = layout.tensor_model_parallel_size
    heads = architecture.num_attention_heads + 2 * architecture.num_query_groups
    sizes = {
        "hidden size": architecture.hidden_size,
        "MLP size per tensor-parallel rank": architecture.ffn_hidden_size // tp,
        "query, key and value size per tensor-parallel rank": heads * architecture.kv_channels // tp,
    }
    for what, size in sizes.items():
        if size % multiple:
            raise InputError(f"precision.fp8: the {what}, {size}, is not a multiple of {multiple}, which FP8 needs")


def megatron_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig; its own FP8 stays off where the rounding is emulated."""
    fields: dict[str, Any] = {
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }
    if precision.fp8 == "on":
        fields.update(
            fp8=precision.fp8_format,
            fp8_recipe=precision.fp8_recipe,
            fp8_param=precision.fp8_param_gather,
            fp8_margin=precision.fp8_margin,
            fp8_amax_history_len=precision.fp8_amax_history_len,
            fp8_amax_compute_algo=precision.fp8_amax_compute_algo,
        )
    return fields


def _check_kind(precision: PrecisionConfig, architecture: Architecture) -> None:
    if architecture.mamba is not None:
        raise InputError(
            "precision.fp8: on is not available for hybrids: their layers run on torch's and mamba_ssm's kernels, not "
            f"on Transformer Engine's, and would train without FP8; leave it off ({_EMULATE})"
        )
    if precision.dtype == "fp32":
        raise InputError("precision.fp8: on goes with dtype bf16, not fp32")


def _check_transformer_engine(precision: PrecisionConfig, architecture: Architecture, layout: ParallelConfig) -> None:
    _check_kind(precision, architecture)
    if not cuda.has_transformer_engine():
        reason = "there is no CUDA device" if cuda.capability() is None else "its layers cannot be imported"
        raise InputError(
            f"precision.fp8: on needs Transformer Engine, and {reason} ('prism-nemo doctor' says more); {_EMULATE}"
        )
    check_fp8_on(precision, architecture, layout, cuda.capability())
