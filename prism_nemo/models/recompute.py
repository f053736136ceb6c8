"""Activation recomputation, in Megatron's terms: what a configuration asks for, and what is refused."""

from __future__ import annotations

from typing import Any

from prism_nemo.config import ParallelConfig, PrecisionConfig, RecomputeConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture

GRANULARITIES = ("none", "selective", "full")
METHODS = ("uniform", "block")
MODULES = ("core_attn", "mlp")


def check_recompute(recompute: RecomputeConfig) -> None:
    """Refuse what no model can have.

    Raises:
        InputError: Naming the key and the values that exist.
    """
    if recompute.granularity not in GRANULARITIES:
        raise InputError(f"recompute.granularity: '{recompute.granularity}' is unknown; known: {_list(GRANULARITIES)}")
    if recompute.method not in METHODS:
        raise InputError(f"recompute.method: '{recompute.method}' is unknown; known: {_list(METHODS)}")
    if recompute.num_layers < 1:
        raise InputError(f"recompute.num_layers: {recompute.num_layers} must be at least 1")
    unknown = [module for module in recompute.modules if module not in MODULES]
    if unknown:
        raise InputError(f"recompute.modules: {_list(unknown)} cannot be recomputed alone; known: {_list(MODULES)}")
    if recompute.granularity == "selective" and not recompute.modules:
        raise InputError(f"recompute.modules: selective recomputation needs at least one of {_list(MODULES)}")


def check_recompute_of(
    recompute: RecomputeConfig, architecture: Architecture, layout: ParallelConfig, precision: PrecisionConfig
) -> None:
    """Refuse what this run cannot have.

    Args:
        recompute: What was asked for.
        architecture: Of the model.
        layout: Over processes; must fit the architecture.
        precision: Of the run.

    Raises:
        InputError: Naming the key and what works.
    """
    check_recompute(recompute)
    if recompute.granularity == "none":
        return
    if architecture.mamba is None:
        layers = architecture.num_layers // layout.pipeline_model_parallel_size
        layers //= layout.virtual_pipeline_model_parallel_size
        if recompute.granularity == "full" and recompute.method == "uniform" and layers % recompute.num_layers:
            # transformer_block.py:470 would go on past the last layer.
            works = [n for n in range(1, layers + 1) if layers % n == 0]
            raise InputError(
                f"recompute.num_layers {recompute.num_layers} does not divide the {layers} layers of each part of the "
                f"pipeline (method uniform); these do: {works}"
            )
        return
    if recompute.granularity == "selective" and "*" not in architecture.layer_pattern:
        raise InputError("recompute.granularity: this model has no attention layer to recompute selectively; use full")
    if recompute.granularity == "full" and precision.fp8 == "on":
        raise InputError(
            "recompute.granularity: a hybrid model cannot recompute whole layers with precision.fp8=on; use "
            "recompute.granularity=selective, or precision.fp8=off"
        )


def recompute_fields(recompute: RecomputeConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig.

    Raises:
        InputError: As `check_recompute`.
    """
    check_recompute(recompute)
    if recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.num_layers,
    }


def _list(names: Any) -> str:
    return ", ".join(names)
