"""Where every weight lies in a native checkpoint, and which Hugging Face rows it is made of.

Keys, shapes and offsets are the model's own: it is built without memory (on torch's meta device), asked for its
sharded state dict, and each sharded tensor is recognised as the stretch of a parameter that it is a view of. So nothing
here knows layers, and a checkpoint written from this table is what `prism_nemo.checkpoint.native.save` would write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from prism_nemo.errors import PrismError
from prism_nemo.models.family import Architecture, table_of
from prism_nemo.models.names import actual_name
from prism_nemo.models.weights import WeightMapping, expand
from prism_nemo.runtime import Runtime


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of this rank's part of a parameter, and the place in the checkpoint that they go to.

    Attributes:
        key: Name of the checkpoint's tensor.
        global_shape: Its shape.
        offset: Of the first element, one number per dimension of `global_shape`.
        shape: [rows, ...].
        mapping: The parameter.
        sources: Its Hugging Face tensors, in the order of ``mapping.hf``.
        first: First row in the rank's part.
        stacked: Leading dimensions of `global_shape` that the parameter does not have (Megatron stacks equal layers).
        writes: Whether this rank writes it; the others have copies.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    mapping: WeightMapping
    sources: tuple[str, ...]
    first: int
    stacked: int
    writes: bool

    def at_row(self, row: int) -> tuple[int, ...]:
        """Offset of a row of this shard in the checkpoint's tensor."""
        offset = list(self.offset)
        offset[self.stacked] += row
        return tuple(offset)


def build_empty(architecture: Architecture, runtime: Runtime) -> Any:
    """This rank's part of the model without memory for its weights.

    Transformer Engine is left out: it needs a device to build, and its checkpoints have the keys of the local layers.
    """
    from prism_nemo.models.build import build_model

    meta = torch.device("meta")
    with meta:
        # Asked for CPU initialisation, Megatron names no device and the context decides; otherwise it asks for CUDA's.
        model = build_model(
            architecture, replace(runtime, device=meta, transformer_engine=False), use_cpu_initialization=True
        )
    real = [name for name, parameter in model.named_parameters() if parameter.device != meta]
    if real:
        raise PrismError(f"parameters were allocated while the model was only to be described: {real[:3]}")
    return model


def parameters_of(
    model: Any, architecture: Architecture, tp_size: int
) -> Iterator[tuple[str, torch.nn.Parameter, WeightMapping, tuple[str, ...]]]:
    """This rank's parameters, each with its mapping and its Hugging Face tensors.

    Raises:
        PrismError: If the weight table does not name a parameter.
    """
    parameters = dict(model.named_parameters())
    local_layer = {layer.layer_number - 1: i for i, layer in enumerate(model.decoder.layers)}
    found = set()
    for mapping, layer in expand(table_of(architecture, tp_size)):
        if layer is not None and layer not in local_layer:
            continue
        sources = mapping.at(layer)[1]
        name = mapping.megatron if layer is None else mapping.megatron.format(layer=local_layer[layer])
        # A tied output layer on the last pipeline stage is its own copy of the embedding.
        names = [name]
        if name == "embedding.word_embeddings.weight" and architecture.tied_embeddings:
            names.append("output_layer.weight")
        for actual in (actual_name(n, parameters) for n in names):
            if actual in parameters:
                found.add(actual)
                yield actual, parameters[actual], mapping, sources
    left = sorted(set(parameters) - found)
    if left:
        raise PrismError(f"the weight table leaves parameters unfilled: {left[:3]}")


def placements(model: Any, architecture: Architecture, tp_size: int) -> tuple[list[Shard], list[Any]]:
    """The shards of this rank's part of the model, and what Megatron saves beside tensors.

    Args:
        model: From `build_empty`.
        architecture: Of the model.
        tp_size: tensor_model_parallel_size.

    Returns:
        Shards, and Megatron's sharded objects (of local layers: empty extra states), those that this rank writes.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        apply_factories,
        is_main_replica,
    )

    from prism_nemo.checkpoint.native import sharding_metadata

    owners: dict[int, tuple[torch.nn.Parameter, WeightMapping, tuple[str, ...]]] = {}
    for _, parameter, mapping, sources in parameters_of(model, architecture, tp_size):
        owners[parameter.untyped_storage()._cdata] = (parameter, mapping, sources)
    content = {"model": model.sharded_state_dict(metadata=sharding_metadata())}
    apply_factories(content)
    shards, objects = [], []
    for value in nested_values(content):
        if isinstance(value, ShardedObject) and is_main_replica(value.replica_id):
            objects.append(value)
        if not isinstance(value, ShardedTensor):
            continue
        data = value.data
        if data is None or data.untyped_storage()._cdata not in owners:
            raise PrismError(f"checkpoint tensor '{value.key}' is no stretch of a parameter")
        parameter, mapping, sources = owners[data.untyped_storage()._cdata]
        row = parameter[0].numel()
        first, rest = divmod(data.storage_offset(), row)
        if rest or data.shape[1:] != parameter.shape[1:] or not data.is_contiguous():
            raise PrismError(f"checkpoint tensor '{value.key}' is not made of whole rows of a parameter")
        shards.append(
            Shard(
                value.key,
                tuple(value.global_shape),
                tuple(value.global_offset),
                tuple(data.shape),
                mapping,
                sources,
                first,
                value.prepend_axis_num,
                is_main_replica(value.replica_id),
            )
        )
    return shards, objects


@dataclass(frozen=True)
class Segment:
    """Rows of a Hugging Face tensor and where a checkpoint keeps them.

    Attributes:
        row: First row in the Hugging Face tensor.
        rows: How many.
        key: Name of the checkpoint's tensor.
        offset: Of the first element in it.
        stacked: See `Shard`.
    """

    row: int
    rows: int
    key: str
    offset: tuple[int, ...]
    stacked: int


def segments(shards: list[Shard]) -> dict[str, tuple[tuple[int, ...], list[Segment]]]:
    """For every Hugging Face tensor, its shape and its rows' places, in the order of the rows.

    Args:
        shards: Of the whole model (TP 1, PP 1); the checkpoint may have been saved at any layout.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    found: dict[str, list[Segment]] = {}
    for shard in shards:
        shapes.update(zip(shard.sources, shard.mapping.hf_shapes(), strict=True))
        row = 0
        for run in shard.mapping.runs(0, 1):
            low, high = max(shard.first, row), min(shard.first + shard.shape[0], row + run.rows)
            if low < high and run.source is not None:
                segment = Segment(
                    run.start + low - row, high - low, shard.key, shard.at_row(low - shard.first), shard.stacked
                )
                found.setdefault(shard.sources[run.source], []).append(segment)
            row += run.rows
    return {name: (shapes[name], sorted(parts, key=lambda part: part.row)) for name, parts in found.items()}
