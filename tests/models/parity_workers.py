"""Forward and backward of a Megatron model beside transformers', in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file
from tiny_models import hf_model

from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.models.family import Architecture, read_hf_config, table_of
from prism_nemo.models.parts import ModelParts
from prism_nemo.models.weights import ColumnParallel, FusedQKV, GatedMLP, Run, WeightMapping, expand
from prism_nemo.runtime import Runtime, start, stop

Change = Callable[[Architecture], Architecture]


def _swapped(items: tuple[Any, ...], i: int, j: int) -> tuple[Any, ...]:
    changed = list(items)
    changed[i], changed[j] = changed[j], changed[i]
    return tuple(changed)


class _HalvesSwapped(GatedMLP):
    def runs(self, rank: int, size: int) -> tuple[Run, ...]:
        return tuple(reversed(super().runs(rank, size)))


def _renamed(mapping: WeightMapping, one: str, other: str) -> WeightMapping:
    names = {one: other, other: one}
    for ours, theirs in names.items():
        if all(name.endswith(ours) for name in mapping.hf):
            return replace(mapping, hf=tuple(name.removesuffix(ours) + theirs for name in mapping.hf))
    return mapping


def mistaken(mapping: WeightMapping, mistake: str) -> WeightMapping:
    """The mapping with a mistake of this kind, or as it is where it cannot have it. All of them keep every shape."""
    name = mapping.megatron
    if mistake == "key and value" and isinstance(mapping, FusedQKV):
        return replace(mapping, hf=_swapped(mapping.hf, 1, 2))
    if mistake == "gate and up" and isinstance(mapping, GatedMLP):
        return _HalvesSwapped(**vars(mapping))
    if isinstance(mapping, ColumnParallel):
        if mistake == "z and x" and name.endswith("in_proj.weight"):
            return replace(mapping, sections=_swapped(mapping.sections, 0, 1))
        if mistake == "B and C" and name.endswith("in_proj.weight"):
            return replace(mapping, sections=_swapped(mapping.sections, 2, 3))
        if mistake == "convolutions of B and C" and "conv1d" in name:
            return replace(mapping, sections=_swapped(mapping.sections, 1, 2))
    if mistake == "A_log and dt_bias":
        return _renamed(mapping, "A_log", "dt_bias")
    if mistake == "D and dt_bias":
        return _renamed(mapping, ".D", ".dt_bias")
    if mistake == "the two norms" and mapping.layers is not None:
        return _renamed(mapping, ".input_layernorm.weight", ".post_attention_layernorm.weight")
    if mistake == "the order of layers" and mapping.layers is not None:
        return _Reversed.of(mapping)
    return mapping


class _Reversed:
    """Mappings whose layers are read from the other end of their own kind."""

    @staticmethod
    def of(mapping: WeightMapping) -> WeightMapping:
        layers = mapping.layers or ()
        other = dict(zip(layers, reversed(layers), strict=True))
        right = type(mapping).at

        class Wrong(type(mapping)):  # type: ignore[misc]
            def at(self, layer: int | None) -> tuple[str, tuple[str, ...]]:
                return right(self, layer)[0], right(self, None if layer is None else other[layer])[1]

        return Wrong(**vars(mapping))  # type: ignore[no-any-return]


def tokens_for(vocab_size: int, batch: int = 2, length: int = 51) -> torch.Tensor:
    """Random tokens; the length is a multiple of no chunk and longer than every window."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocab_size, (batch, length), generator=generator)


def _reference(hf_dir: str, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of transformers, and the gradient of the mean next-token loss of every tensor."""
    model = hf_model(hf_dir).train()
    logits = model(input_ids=tokens, use_cache=False).logits
    vocab = logits.shape[-1]
    torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, vocab), tokens[:, 1:].reshape(-1)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def _trainer(
    architecture: Architecture, hf_dir: str, parallel: ParallelConfig, length: int, runtime: Runtime | None = None
) -> Any:
    from prism_nemo.training.trainer import Trainer

    runtime = runtime or start(parallel, seed=1)
    trainer = Trainer(architecture, runtime, OptimizerConfig(), length, use_distributed_optimizer=False)
    _fill(trainer.raw, read_hf_config(Path(hf_dir)), load_file(Path(hf_dir) / "model.safetensors"))
    return trainer


@torch.no_grad()
def _fill(
    model: Any,
    architecture: Architecture,
    tensors: dict[str, torch.Tensor],
    table: list[WeightMapping] | None = None,
) -> None:
    """This rank's parameters, by the family's table alone: what reads files is tested elsewhere."""
    if isinstance(model, ModelParts):
        for part in model:
            _fill(part, architecture, tensors, table)
        return
    tp, rank = model.pg_collection.tp.size(), model.pg_collection.tp.rank()
    parameters = dict(model.named_parameters())
    local = {layer.layer_number - 1: i for i, layer in enumerate(model.decoder.layers)}
    for mapping, layer in expand(table or table_of(architecture, tp)):
        if layer is None or layer in local:
            names, sources = _local(mapping, layer, local, architecture.tied_embeddings)
            for name in set(names) & set(parameters):
                parameters[name].copy_(mapping.to_megatron(tuple(tensors[s] for s in sources), rank, tp))


def _gradients(trainer: Any, tokens: torch.Tensor) -> None:
    """Leave the gradient of the mean next-token loss in every parameter's main_grad, as a training step would."""
    from prism_nemo.models.forward import positions
    from prism_nemo.training.midtrain import forward_step

    mask = torch.ones_like(tokens, dtype=torch.float32)
    mask[:, -1] = 0  # its label would be the row's first token
    rows = {
        "tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": mask, "position_ids": positions(tokens),
    }  # fmt: skip

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        yield rows

    trainer.model.zero_grad_buffer()
    trainer._run(forward_step, batches(), 1, tokens.shape[0], tokens.shape[1], forward_only=False)


def _local(mapping: WeightMapping, layer: int | None, local: dict[int, int], tied: bool) -> tuple[list[str], Any]:
    if layer is None:
        names = [mapping.megatron]
        if tied and mapping.megatron.startswith("embedding"):
            names.append("output_layer.weight")
        return names, mapping.hf
    return [mapping.at(local[layer])[0]], mapping.at(layer)[1]


def compare(
    hf_dir: str, parallel: ParallelConfig, change: Change | None = None, length: int = 51
) -> tuple[float, float, dict[str, float]]:
    """Both models on the same tokens.

    Args:
        hf_dir: Folder of the reference.
        parallel: Layout of the Megatron model.
        change: Applied to the architecture that Megatron gets, to see that a difference shows.
        length: Tokens of a row.

    Returns:
        Largest difference of logits over their standard deviation; largest difference of a gradient over that
        parameter's largest gradient; and the latter for each parameter.
    """
    from prism_nemo.models.forward import forward_logits

    read = read_hf_config(Path(hf_dir))
    architecture = change(read) if change else read
    tokens = tokens_for(read.vocab_size, length=length)
    trainer = _trainer(architecture, hf_dir, parallel, length)
    theirs, reference = _reference(hf_dir, tokens)
    ours = forward_logits(trainer.raw, tokens)
    worst_logit = 0.0
    if ours is not None:
        worst_logit = ((ours[..., : read.vocab_size] - theirs).abs().max() / theirs.std()).item()
    _gradients(trainer, tokens)
    every = gradient_errors(trainer, read, parallel, reference)
    logits: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(logits, worst_logit)
    stop()
    return max(logits), max(every.values()), every


def gradient_errors(
    trainer: Any, read: Architecture, parallel: ParallelConfig, reference: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Largest difference of each parameter's gradient over all ranks, over that parameter's largest gradient.

    Args:
        trainer: After a backward pass.
        read: The reference's architecture.
        parallel: Its layout.
        reference: Gradients under transformers' names.
    """
    from megatron.core import parallel_state

    tp, rank = parallel.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
    errors: dict[str, float] = {}
    whole = True
    for part in trainer.raw if isinstance(trainer.raw, ModelParts) else [trainer.raw]:
        parameters = dict(part.named_parameters())
        local = {layer.layer_number - 1: i for i, layer in enumerate(part.decoder.layers)}
        for mapping, layer in expand(table_of(read, tp)):
            if layer is not None and layer not in local:
                continue
            names, sources = _local(mapping, layer, local, read.tied_embeddings)
            sources = tuple(s.replace("backbone.", "model.") for s in sources)
            wanted = mapping.to_megatron(tuple(reference[s] for s in sources), rank, tp)
            for name in names:
                if name in parameters:
                    scale = max(reference[s].abs().max().item() for s in sources)
                    difference = (parameters[name].main_grad - wanted).abs().max().item()
                    errors[mapping.at(layer)[0]] = difference / max(scale, 1e-12)
        whole &= set(parameters) == _expected(read, tp, local, parameters)
    gathered: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(gathered, (errors, whole))
    assert all(complete for _, complete in gathered), "the table leaves a parameter out"
    return {name: max(g[0].get(name, 0.0) for g in gathered) for g0 in gathered for name in g0[0]}


def _expected(read: Architecture, tp: int, local: dict[int, int], parameters: Any) -> set[str]:
    names = set()
    for mapping, layer in expand(table_of(read, tp)):
        if layer is None or layer in local:
            names |= {n for n in _local(mapping, layer, local, read.tied_embeddings)[0] if n in parameters}
    return names


def compare_changed(hf_dir: str, changes: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """`compare` with fields of the architecture replaced, one after another."""
    return [compare(hf_dir, ParallelConfig(), lambda a, c=c: replace(a, **c))[:2] for c in changes]  # type: ignore[misc]


def logits_with_mistakes(hf_dir: str, mistakes: list[str]) -> dict[str, float | None]:
    """Largest difference of logits over their standard deviation, with each mistake in the weight table.

    None for a mistake that this family's table cannot have.
    """
    from prism_nemo.models.forward import forward_logits

    architecture = read_hf_config(Path(hf_dir))
    tokens = tokens_for(architecture.vocab_size)
    theirs = hf_model(hf_dir)(input_ids=tokens, use_cache=False).logits.detach()
    tensors = load_file(Path(hf_dir) / "model.safetensors")
    model = _trainer(architecture, hf_dir, ParallelConfig(), tokens.shape[1]).raw
    table = table_of(architecture)
    found: dict[str, float | None] = {}
    for mistake in mistakes:
        wrong = [mistaken(mapping, mistake) for mapping in table]
        _fill(model, architecture, tensors, wrong)
        ours = forward_logits(model, tokens)
        assert ours is not None
        difference = ((ours[..., : architecture.vocab_size] - theirs).abs().max() / theirs.std()).item()
        found[mistake] = None if wrong == table else difference
    stop()
    return found


def isolation(hf_dir: str, parallel: ParallelConfig, lengths: list[int]) -> tuple[float, float, float]:
    """Packed documents: one row of `lengths` tokens, TP only.

    Returns:
        Largest change of other documents' logits when one document's tokens change (each is changed in turn); largest
        difference between a document's logits in the row and alone, over their standard deviation; and how far the
        row's logits are from those without packing (so that the first two mean something).
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from prism_nemo.models.forward import positions

    architecture = read_hf_config(Path(hf_dir))
    trainer = _trainer(architecture, hf_dir, parallel, sum(lengths))
    model = trainer.raw.eval()
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )

    @torch.no_grad()
    def run(tokens: torch.Tensor, packed: bool) -> torch.Tensor:
        extra = {"packed_seq_params": packing} if packed else {}
        logits = gather_from_tensor_model_parallel_region(model(tokens, positions(tokens), None, **extra))
        return logits[0, :, : architecture.vocab_size]

    row = tokens_for(architecture.vocab_size, batch=1, length=sum(lengths))
    whole = run(row, packed=True)
    leak = alone = 0.0
    for start_, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        other = row.clone()
        other[:, start_:end] = (other[:, start_:end] + 1) % architecture.vocab_size
        moved = (run(other, packed=True) - whole).abs()
        assert moved[start_:end].max() > 1e-3
        moved[start_:end] = 0
        leak = max(leak, moved.max().item())
        pad = (-(end - start_)) % parallel.tensor_model_parallel_size if parallel.sequence_parallel else 0
        single = torch.nn.functional.pad(row[:, start_:end], (0, pad))
        difference = run(single, packed=False)[: end - start_] - whole[start_:end]
        alone = max(alone, (difference.abs().max() / whole.std()).item())
    unpacked = ((run(row, packed=False) - whole).abs().max() / whole.std()).item()
    stop()
    return leak, alone, unpacked
