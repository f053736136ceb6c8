"""What each process of an export does: read regions of the checkpoint, write its share of the files."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.checkpoint.atomic import MANIFEST, ORIGIN, publish_folder, read_manifest
from prism_nemo.checkpoint.distcp_reader import CheckpointReader
from prism_nemo.checkpoint.files import clean_failure
from prism_nemo.checkpoint.hashes import sha256
from prism_nemo.checkpoint.hf import HEAD, blocks_of, embedding_name
from prism_nemo.checkpoint.hf_writer import Planned, plan_files, write_file, write_index
from prism_nemo.checkpoint.importing import CARRIED, carry, on_main, temporary_folder, together
from prism_nemo.checkpoint.placement import Segment, build_empty, placements, segments
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import PrismError
from prism_nemo.models.family import Architecture
from prism_nemo.runtime import Runtime, start, stop


class CheckpointTensors:
    """A checkpoint's weights as Hugging Face tensors.

    Args:
        checkpoint: The open checkpoint, saved at any layout.
        architecture: Of its model.
        runtime: TP 1, PP 1; the model is described, not built.
        tied_head: Whether the output layer is there too although it is the embedding.

    Attributes:
        shapes: By name, in the order of the model.
    """

    def __init__(
        self, checkpoint: CheckpointReader, architecture: Architecture, runtime: Runtime, tied_head: bool
    ) -> None:
        self._checkpoint = checkpoint
        shards, _ = placements(build_empty(architecture, runtime), architecture, 1)
        found = segments(shards)
        if tied_head:
            found[HEAD] = found[embedding_name(architecture)]
        self._segments = {name: parts for name, (_, parts) in found.items()}
        self.shapes = {name: shape for name, (shape, _) in found.items()}
        for name, parts in self._segments.items():
            row = 0
            for part in parts:
                row = row + part.rows if part.row == row else -1
            if row != self.shapes[name][0]:
                raise PrismError(f"the weight table does not say where every row of '{name}' is")

    def dtype(self, name: str) -> torch.dtype:
        """Type in which a tensor is stored."""
        return self._checkpoint.dtype(self._segments[name][0].key)

    def blocks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """A tensor's rows, block by block, in another type if one is given."""
        stored, tail = self.dtype(name), self.shapes[name][1:]
        for part in self._segments[name]:
            for first, rows in blocks_of((part.rows, *tail), stored):
                block = torch.empty((rows, *tail), dtype=stored)
                self._checkpoint.read(part.key, _at(part, first), block.view((1,) * part.stacked + tuple(block.shape)))
                yield block if dtype is None else block.to(dtype)


def _at(part: Segment, row: int) -> tuple[int, ...]:
    return (*part.offset[: part.stacked], part.offset[part.stacked] + row, *part.offset[part.stacked + 1 :])


def hf_config(architecture: Architecture, sizes: dict[torch.dtype, int]) -> dict[str, Any]:
    """``config.json`` of an export: as imported, with the type that was written (of most bytes, if there are several).

    Both spellings of the key are understood; the one that the import read is kept.
    """
    written = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    config = dict(architecture.hf_config)
    old = "torch_dtype" in config
    if old:
        config["torch_dtype"] = written
    if not old or "dtype" in config:
        config["dtype"] = written
    return config


def origin(checkpoint: Path) -> dict[str, Any]:
    """Where an export comes from: the checkpoint's last names, no path of this machine, and its manifest's hash."""
    names = checkpoint.resolve().parts
    last = names[-3:] if len(names) > 2 and names[-2] == "checkpoints" else names[-1:]
    return {"checkpoint": "/".join(last), "manifest_sha256": sha256(checkpoint / MANIFEST)}


def export_worker(
    checkpoint: str,
    out: str,
    architecture: Architecture,
    dtype: torch.dtype | None,
    tokenizer: str | None,
    max_shard_bytes: int,
    parallel: ParallelConfig,
) -> None:
    """One rank's share of an export; see `prism_nemo.checkpoint.convert.export_hf`."""
    runtime = start(parallel, seed=0)
    source, final = Path(checkpoint), Path(out)
    tied_head = bool(read_manifest(source).get("stored_tied_head"))
    try:
        with CheckpointReader(source) as reader:
            tensors = CheckpointTensors(reader, architecture, runtime, tied_head)
            planned = [
                Planned(name, dtype or tensors.dtype(name), shape, functools.partial(tensors.blocks, name, dtype))
                for name, shape in tensors.shapes.items()
            ]
            files = plan_files(planned, max_shard_bytes)
            sizes: dict[torch.dtype, int] = {}
            for tensor in planned:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
            config = hf_config(architecture, sizes)
            carried = Path(tokenizer) if tokenizer else source / CARRIED
            with temporary_folder(final, sum(sizes.values())) as temporary:
                together(lambda: _write_share(temporary, final, files))
                on_main(lambda: _finish(temporary, final, files, config, carried, origin(source)))
    finally:
        stop()


def _write_share(temporary: Path, final: Path, files: dict[str, list[Planned]]) -> None:
    with clean_failure(final):
        for i, (name, tensors) in enumerate(files.items()):
            if i % dist.get_world_size() == dist.get_rank():
                write_file(temporary / name, tensors)


def _finish(
    temporary: Path,
    final: Path,
    files: dict[str, list[Planned]],
    config: dict[str, Any],
    carried: Path,
    come_from: dict[str, Any],
) -> None:
    with clean_failure(final):
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (temporary / ORIGIN).write_text(json.dumps(come_from, indent=2) + "\n")
        carry(carried, temporary)
        write_index(temporary, files)
        publish_folder(temporary, final)
