"""Native checkpoint to NeMo 2.x checkpoint folder.

The weights keep Megatron's names (with NeMo's ``module.`` in front) and the types that they are stored in. They are
written as NeMo with Transformer Engine saves them, equal layers stacked; NeMo reads how from ``common.pt``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from prism_nemo.checkpoint.atomic import publish_folder, read_manifest
from prism_nemo.checkpoint.convert import refuse_existing, run
from prism_nemo.checkpoint.distcp import CHUNK_BYTES, ChunkWriter, write_metadata
from prism_nemo.checkpoint.distcp_reader import CheckpointReader
from prism_nemo.checkpoint.files import clean_failure, read_ahead
from prism_nemo.checkpoint.hf import blocks_of
from prism_nemo.checkpoint.importing import CARRIED, carry, on_main, temporary_folder
from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.checkpoint.nemo.context import IO_JSON, MODEL_YAML
from prism_nemo.checkpoint.nemo.folder import CONTEXT, WEIGHTS
from prism_nemo.checkpoint.nemo.io_writer import io_json, model_yaml
from prism_nemo.checkpoint.nemo.keys import EMBEDDING, EXTRA_STATE, PREFIX
from prism_nemo.checkpoint.nemo.tokenizer import TOKENIZER_FOLDER, has_tokenizer
from prism_nemo.checkpoint.nemo.writing_config import nemo_model, trainer_context
from prism_nemo.checkpoint.placement import Shard, build_empty, placements
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture
from prism_nemo.runtime import start, stop

# How NeMo makes the sharded state dict that it loads into (megatron_strategy.py, sharded_state_dict_metadata).
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
# Modules of Transformer Engine that keep scaling state, by the parameter beside which it lies.
_WITH_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj")


def export_nemo(checkpoint: Path, out: Path, tokenizer: Path | None = None) -> list[str]:
    """Native checkpoint, saved at any layout, to a NeMo 2.x checkpoint folder; weights only.

    Args:
        checkpoint: By an import or by a training stage.
        out: Folder to create.
        tokenizer: Folder whose tokenizer files are copied; those that the import carried along if not given.

    Returns:
        What a user has to know, a sentence each.

    Raises:
        InputError: If the checkpoint is incomplete, its family has no class in NeMo, or `out` exists; nothing was
            written.
        PrismError: If writing failed; nothing is left.
    """
    architecture = read_architecture(checkpoint)
    refuse_existing(out)
    with CheckpointReader(checkpoint) as reader:
        dtype = reader.dtype(EMBEDDING)
    carried = tokenizer or checkpoint / CARRIED
    found = has_tokenizer(carried)
    if tokenizer is not None and not found:
        raise InputError(f"--tokenizer {tokenizer}: holds no tokenizer files")
    model = nemo_model(architecture, dtype, found)
    context = {
        IO_JSON: json.dumps(io_json(trainer_context(model)), indent=1),
        MODEL_YAML: yaml.safe_dump(model_yaml(model), sort_keys=False),
    }
    run(_worker, str(checkpoint), str(out), architecture, context, str(carried), ParallelConfig())
    notes = [] if found else ["no tokenizer files came along; NeMo needs one given when it loads the model"]
    if architecture.family == "nemotron_h" and not found:
        notes.append("NeMo's MambaModel cannot be built without a tokenizer; export again with --tokenizer")
    return notes


def _worker(
    checkpoint: str,
    out: str,
    architecture: Architecture,
    context: dict[str, str],
    carried: str,
    parallel: ParallelConfig,
) -> None:
    """The work, on the first of however many processes there are."""
    runtime = start(parallel, seed=0)
    source, final = Path(checkpoint), Path(out)
    try:
        shards, objects = placements(build_empty(architecture, runtime), architecture, 1)
        with CheckpointReader(source) as reader:
            size = sum(torch.Size(shard.shape).numel() * reader.dtype(shard.key).itemsize for shard in shards)
            with temporary_folder(final, size) as temporary:

                def work() -> None:
                    with clean_failure(final):
                        _write_weights(temporary / WEIGHTS, reader, shards, objects, source)
                        _write_context(temporary / CONTEXT, context, Path(carried))
                        publish_folder(temporary, final)

                on_main(work)
    finally:
        stop()


def _write_weights(
    folder: Path, reader: CheckpointReader, shards: list[Shard], objects: list[Any], source: Path
) -> None:
    folder.mkdir()
    with ChunkWriter(folder, 0) as writer:
        for shard in shards:
            dtype = reader.dtype(shard.key)
            for first, rows in blocks_of(shard.shape, dtype, CHUNK_BYTES):
                sizes = (1,) * shard.stacked + (rows, *shard.shape[1:])
                blocks = read_ahead(_blocks(reader, shard, first, rows))
                writer.tensor(PREFIX + shard.key, dtype, shard.global_shape, shard.at_row(first), sizes, blocks)
        for key in extra_states(shards, [value.unique_key for value in objects]):
            writer.object(PREFIX + key, None)
        writer.finish()
    write_metadata(folder, [writer.record])
    common = {"content_metadata": _CONTENT, "epoch": 0, "global_step": int(read_manifest(source).get("step", 0))}
    torch.save(common, folder / "common.pt")


def _blocks(reader: CheckpointReader, shard: Shard, first: int, rows: int) -> Iterator[torch.Tensor]:
    dtype, tail = reader.dtype(shard.key), shard.shape[1:]
    for begun, count in blocks_of((rows, *tail), dtype):
        block = torch.empty((count, *tail), dtype=dtype)
        view = block.view((1,) * shard.stacked + tuple(block.shape))
        reader.read(shard.key, shard.at_row(first + begun), view)
        yield block


def extra_states(shards: list[Shard], known: list[str]) -> list[str]:
    """Keys of the scaling states that a model with Transformer Engine asks a checkpoint for.

    Its modules save a state each, empty without FP8, and Megatron refuses a checkpoint that lacks one: which modules do
    is a matter of release (the attention itself until Megatron-Core 0.15, norms since Transformer Engine 2.1). One too
    many is not looked at, so all are written, empty.

    Args:
        shards: Of the whole model.
        known: Those that the model without Transformer Engine has.
    """
    keys = set(known)
    for shard in shards:
        parts = shard.key.split(".")
        place = f"{shard.offset[0]}_{shard.global_shape[0]}" if shard.stacked else "0_1"
        if parts[-1] == "weight" and parts[-2] in _WITH_STATE:
            module = ".".join(parts[:-1])
            keys.add(f"{module}{EXTRA_STATE}/shard_{place}")
            if parts[-2] == "linear_qkv":
                keys.add(f"{module.removesuffix('linear_qkv')}core_attention{EXTRA_STATE}/shard_{place}")
        elif parts[-2] in ("final_layernorm", "final_norm") or parts[-3:-1] == ["mixer", "norm"]:
            keys.add(f"{'.'.join(parts[:-1])}{EXTRA_STATE}/shard_{place}")
    return sorted({*keys, f"output_layer{EXTRA_STATE}/shard_0_1"})


def _write_context(folder: Path, files: dict[str, str], carried: Path) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    if has_tokenizer(carried):
        carry(carried, folder / TOKENIZER_FOLDER)
