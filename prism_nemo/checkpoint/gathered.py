"""A model that is spread over tensor- and pipeline-parallel ranks, tensor by tensor, as Hugging Face has it.

An export without files: what a program beside the trainer needs to follow its weights. At any moment a rank holds one
whole parameter beside its own part of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from prism_nemo.checkpoint.placement import parameters_of
from prism_nemo.errors import PrismError
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.family import table_of
from prism_nemo.models.weights import WeightMapping, expand

# (name in the weight table, Hugging Face tensors): one parameter of the whole model.
_Key = tuple[str, tuple[str, ...]]


@torch.no_grad()
def gathered_hf_tensors(model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights, whole, under their Hugging Face names; every rank of its model-parallel group calls this.

    The ranks talk to each other at every step of the iterator: whoever starts must go through to the end, and do
    nothing collective in between that not every rank does. A tied output layer is not given beside the embedding.

    Args:
        model: This rank's part, in any tensor- and pipeline-parallel layout (context-parallel ranks have copies).

    Yields:
        Name and tensor, on the device and in the type of the parameter, the same on every rank. A tensor may share
        memory with nothing else and is the caller's to keep.

    Raises:
        PrismError: If the weight table and the parameters of the ranks do not agree.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    architecture = model.architecture
    mine: dict[_Key, tuple[torch.Tensor, WeightMapping]] = {}
    for _, parameter, mapping, sources in parameters_of(model, architecture, tp):
        # A tied output layer, which comes after the embedding, is a copy of it.
        mine.setdefault((mapping.megatron, sources), (parameter.detach(), mapping))
    stages = _stages({key: parameter.dtype for key, (parameter, _) in mine.items()})
    # At some tensor-parallel sizes one tensor is made of several parameters (a mixer's projection and its B and C).
    together: dict[tuple[str, ...], list[WeightMapping]] = {}
    for mapping, layer in expand(table_of(architecture, tp)):
        together.setdefault(mapping.at(layer)[1], []).append(mapping)
    device = next(model.parameters()).device
    for sources, mappings in together.items():
        keys = [(mapping.megatron, sources) for mapping in mappings]
        missing = [key[0] for key in keys if key not in stages]
        if missing:
            raise PrismError(f"no rank holds '{missing[0]}', which '{sources[0]}' is made of")
        stage, dtype = stages[keys[0]]
        whole = [torch.empty(shape, dtype=dtype, device=device) for shape in _shapes(mappings)]
        if stage == parallel_state.get_pipeline_model_parallel_rank():
            for key in keys:
                _fill(whole, *mine[key], tp)
        _share(whole, stage)
        yield from zip(sources, whole, strict=True)


def _stages(mine: dict[_Key, torch.dtype]) -> dict[_Key, tuple[int, torch.dtype]]:
    """The first pipeline stage that holds each parameter, and the type in which it does."""
    group = parallel_state.get_pipeline_model_parallel_group()
    everyone: list[Any] = [mine] * group.size()
    if group.size() > 1:
        dist.all_gather_object(everyone, mine, group=group)
    found: dict[_Key, tuple[int, torch.dtype]] = {}
    for stage, held in enumerate(everyone):
        for key, dtype in held.items():
            found.setdefault(key, (stage, dtype))
    return found


def _shapes(mappings: list[WeightMapping]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that several parameters make up: one parameter may end before the tensor does."""
    shapes = [mapping.hf_shapes() for mapping in mappings]
    return [max(candidates) for candidates in zip(*shapes, strict=True)]


def _fill(whole: list[torch.Tensor], parameter: torch.Tensor, mapping: WeightMapping, tp: int) -> None:
    """Put every tensor-parallel rank's part of a parameter where it belongs; the stage's ranks call this together."""
    parts = [parameter]
    if tp > 1:
        part = parameter.contiguous()
        parts = [torch.empty_like(part) for _ in range(tp)]
        dist.all_gather(parts, part, group=parallel_state.get_tensor_model_parallel_group())
    for rank, part in enumerate(parts):
        first, last = mapping.columns(rank, tp)
        row = 0
        for run in mapping.runs(rank, tp):
            if run.source is not None:
                target = whole[run.source][run.start : run.start + run.rows]
                (target[:, first:last] if target.dim() > 1 else target).copy_(part[row : row + run.rows])
            row += run.rows


def _share(whole: list[torch.Tensor], stage: int) -> None:
    """From the stage that holds them to all others, each tensor-parallel rank to those of its own place."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        for tensor in whole:
            dist.broadcast(tensor, group=group, group_src=stage)
