"""Import, export and verify: the functions behind the three commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from prism_nemo.checkpoint.hf import HFReader, expand, table_of, write_hf
from prism_nemo.checkpoint.native import load, read_architecture, save
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.family import Architecture, read_hf_config
from prism_nemo.models.names import actual_name
from prism_nemo.runtime import start, stop
from prism_nemo.runtime.launch import launch

# fp32 logits of two correct implementations differ by rounding only: each logit is a sum of `hidden` products whose
# inputs went through `layers` blocks, measured at 1e-7 to 3e-6 on logits of standard deviation 0.05 to 0.7. A wrong
# mapping, scalar or mask shows at 1e-3 and above. The tolerance scales with the logits, so that it means the same for
# a model whose logits are large.
RELATIVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verification:
    """Result of forwarding both models on the same tokens."""

    max_abs_logit_diff: float
    tolerance: float
    logit_std: float
    argmax_agreement: float
    tokens: int

    @property
    def passed(self) -> bool:
        """Whether the largest difference is within the tolerance."""
        return self.max_abs_logit_diff <= self.tolerance


def load_hf_weights(model: torch.nn.Module, architecture: Architecture, reader: HFReader, tp_size: int) -> None:
    """Fill this rank's parameters from a Hugging Face folder.

    Raises:
        InputError: If a tensor is missing or has the wrong shape.
    """
    from megatron.core import parallel_state

    parameters = dict(model.named_parameters())
    rank = parallel_state.get_tensor_model_parallel_rank()
    local_layer = {layer.layer_number - 1: i for i, layer in enumerate(model.decoder.layers)}  # type: ignore[union-attr,arg-type]
    filled = set()
    for mapping, layer in expand(table_of(architecture, tp_size), architecture):
        if layer is not None and layer not in local_layer:
            continue
        name, sources = mapping.at(layer)
        target_name = mapping.at(local_layer[layer])[0] if layer is not None else name
        # A tied output layer on the last pipeline stage is its own copy of the embedding.
        names = [target_name]
        if target_name == "embedding.word_embeddings.weight" and architecture.tied_embeddings:
            names.append("output_layer.weight")
        for target_name in (actual_name(n, parameters) for n in names):
            if target_name not in parameters:
                continue
            full = mapping.to_megatron(tuple(reader.get(source) for source in sources))
            part = mapping.shard(full, rank, tp_size)
            target = parameters[target_name]
            if part.shape != target.shape:
                raise InputError(
                    f"{reader.folder}: {', '.join(sources)} give shape {tuple(part.shape)}, but config.json implies "
                    f"{tuple(target.shape)}"
                )
            with torch.no_grad():
                target.copy_(part)
            filled.add(target_name)
    left = sorted(set(parameters) - filled)
    if left:
        raise PrismError(f"the weight table leaves parameters unfilled: {left[:3]}")


def _import_worker(hf_dir: str, out: str, parallel: ParallelConfig) -> None:
    from prism_nemo.models.build import build_model

    runtime = start(parallel, seed=0)
    architecture = read_hf_config(Path(hf_dir))
    model = build_model(architecture, runtime)
    load_hf_weights(model, architecture, HFReader(Path(hf_dir)), parallel.tensor_model_parallel_size)
    save(Path(out), model, architecture, manifest={"imported_from": str(hf_dir)})
    stop()


def import_hf(hf_dir: Path, out: Path, parallel: ParallelConfig) -> None:
    """Hugging Face folder to native checkpoint.

    The layout decides only how the work is shared: the checkpoint loads at any layout.

    Raises:
        InputError: Before any work, for a folder, layout or output that cannot be used.
    """
    architecture = read_hf_config(hf_dir)
    architecture.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    HFReader(hf_dir).check(architecture)
    if out.exists():
        raise InputError(f"{out}: already exists; remove it or choose another name")
    launch(_import_worker, str(hf_dir), str(out), parallel, processes=parallel.world_size)


def hf_tensors(model: torch.nn.Module, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights under their Hugging Face names; the model must be whole on this rank (TP 1, PP 1)."""
    parameters = dict(model.named_parameters())
    for mapping, layer in expand(table_of(architecture), architecture):
        name, targets = mapping.at(layer)
        yield from zip(targets, mapping.to_hf(parameters[actual_name(name, parameters)].detach()), strict=True)


def hf_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, object]:
    """``config.json`` of an export: as imported, with the dtype that was written."""
    return {**architecture.hf_config, "dtype": str(dtype).removeprefix("torch.")}


def _export_worker(checkpoint: str, out: str, dtype: torch.dtype, tokenizer: str | None) -> None:
    from prism_nemo.models.build import build_model

    runtime = start(ParallelConfig(), seed=0, dtype=torch.float32)
    architecture = read_architecture(Path(checkpoint))
    model = build_model(architecture, runtime)
    load(Path(checkpoint), model)
    tensors = ((name, tensor.to(dtype)) for name, tensor in hf_tensors(model, architecture))
    write_hf(tensors, hf_config(architecture, dtype), Path(out), Path(tokenizer) if tokenizer else None)
    stop()


def export_hf(checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32, tokenizer: Path | None = None) -> None:
    """Native checkpoint, saved at any layout, to a Hugging Face folder.

    Raises:
        InputError: If the checkpoint is incomplete or `out` exists.
    """
    read_architecture(checkpoint)
    if out.exists():
        raise InputError(f"{out}: already exists; remove it or choose another folder")
    launch(_export_worker, str(checkpoint), str(out), dtype, str(tokenizer) if tokenizer else None)


def _verify_worker(
    hf_dir: str, checkpoint: str, parallel: ParallelConfig, batch: int, length: int, seed: int
) -> object:
    from megatron.core import parallel_state
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from prism_nemo.models.build import build_model
    from prism_nemo.models.forward import forward_logits

    runtime = start(parallel, seed=0, dtype=torch.float32)
    architecture = read_architecture(Path(checkpoint))
    model = build_model(architecture, runtime, seq_length=length)
    load(Path(checkpoint), model)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, architecture.vocab_size, (batch, length), generator=generator).to(runtime.device)
    ours = forward_logits(model, tokens)
    result = None
    if ours is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        reference: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=torch.float32, attn_implementation="sdpa"
        )
        with torch.no_grad():
            theirs = reference.to(runtime.device).eval()(input_ids=tokens).logits.float()
        result = compare_logits(ours[..., : architecture.vocab_size], theirs)
    results: list[Verification | None] = [None] * runtime.world_size
    dist.all_gather_object(results, result)  # only one rank has it; which one depends on the layout
    stop()
    return next(r for r in results if r is not None)


def compare_logits(ours: torch.Tensor, theirs: torch.Tensor) -> Verification:
    """Largest difference of two [b, s, vocab] logit tensors, with the tolerance that applies to them."""
    scale = theirs.abs().max().item()
    difference = (ours - theirs).abs().max().item()
    return Verification(
        max_abs_logit_diff=difference if difference == difference else float("inf"),
        tolerance=RELATIVE_TOLERANCE * max(scale, 1e-3),
        logit_std=theirs.std().item(),
        argmax_agreement=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        tokens=ours.shape[0] * ours.shape[1],
    )


def verify(
    hf_dir: Path, checkpoint: Path, parallel: ParallelConfig, batch: int = 2, length: int = 64, seed: int = 0
) -> Verification:
    """Forward the Hugging Face model and the Megatron model on the same random tokens, in fp32.

    Args:
        hf_dir: Hugging Face folder.
        checkpoint: Native checkpoint.
        parallel: Layout in which the Megatron model is loaded.
        batch: Sequences.
        length: Tokens per sequence.
        seed: Of the tokens.

    Raises:
        InputError: For a folder, checkpoint or layout that cannot be used.
    """
    theirs, architecture = read_hf_config(hf_dir), read_architecture(checkpoint)
    HFReader(hf_dir).check(theirs)
    for field in ("vocab_size", "num_layers"):
        if getattr(theirs, field) != getattr(architecture, field):
            raise InputError(
                f"{field} is {getattr(theirs, field)} in {hf_dir} but {getattr(architecture, field)} in {checkpoint}: "
                "not the same model"
            )
    architecture.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    args = (str(hf_dir), str(checkpoint), parallel, batch, length, seed)
    result = launch(_verify_worker, *args, processes=parallel.world_size)
    if not isinstance(result, Verification):
        raise PrismError("verification produced no result")
    return result
