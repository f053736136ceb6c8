"""NeMo 2.x checkpoint to native checkpoint.

Both are Megatron's distributed checkpoints, so weights go over region by region, in the type that they are stored in;
no model is built in memory. Whatever the sizes of the parallel run that saved them, the result loads at any layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prism_nemo.checkpoint.atomic import HASHES, publish
from prism_nemo.checkpoint.convert import refuse_existing, run
from prism_nemo.checkpoint.distcp import CHUNK_BYTES, ChunkWriter, Record, write_metadata
from prism_nemo.checkpoint.distcp_reader import CheckpointReader
from prism_nemo.checkpoint.files import clean_failure, read_ahead
from prism_nemo.checkpoint.hashes import files_below, sha256
from prism_nemo.checkpoint.hf import blocks_of
from prism_nemo.checkpoint.importing import CARRIED, carry, on_main, temporary_folder
from prism_nemo.checkpoint.metadata_file import read_metadata
from prism_nemo.checkpoint.nemo.context import ModelContext, read_context
from prism_nemo.checkpoint.nemo.folder import NemoFolder, open_folder, read_common
from prism_nemo.checkpoint.nemo.keys import EMBEDDING, EXTRA_STATE, Place, StoredKeys
from prism_nemo.checkpoint.nemo.reading_config import architecture_of
from prism_nemo.checkpoint.nemo.tokenizer import Vocabulary, find_tokenizer
from prism_nemo.checkpoint.placement import Shard, build_empty, placements
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture
from prism_nemo.run import versions
from prism_nemo.runtime import start, stop

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NemoImport:
    """What an import found.

    Attributes:
        family: Of the model.
        step: Training step of the checkpoint; None where it does not say.
        notes: What was left out or assumed, a sentence each.
        not_finite: Checkpoint tensors that hold NaN or infinity.
    """

    family: str
    step: int | None
    notes: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


@dataclass
class Opened:
    """A checkpoint whose description was read and found convertible; no weights were read.

    Attributes:
        folder: Its parts.
        context: The model as NeMo describes it.
        architecture: The same in our terms.
        keys: Its tensors.
        vocabulary: Its tokenizer's folder and size.
        step: Training step; None where it does not say.
        notes: What is left out or assumed.
    """

    folder: NemoFolder
    context: ModelContext
    architecture: Architecture
    keys: StoredKeys
    vocabulary: Vocabulary
    step: int | None
    notes: list[str]


def open_checkpoint(root: Path, vocab_size: int | None = None) -> Opened:
    """Read everything but the weights.

    Args:
        root: The NeMo checkpoint.
        vocab_size: Entries of the vocabulary without padding, where the checkpoint does not say.

    Raises:
        InputError: For a checkpoint that cannot be converted.
    """
    folder = open_folder(root)
    context = read_context(folder)
    tensors = {
        key: value
        for key, value in read_metadata(folder.weights).state_dict_metadata.items()
        if hasattr(value, "chunks")
    }
    shapes = {key: tuple(value.size) for key, value in tensors.items()}
    # Transformer Engine saves its scaling state as objects, or as bytes in a tensor: nothing that weights need.
    weights = {key: shape for key, shape in shapes.items() if EXTRA_STATE not in key}
    keys = StoredKeys(weights, str(folder.weights))
    for key, value in tensors.items():
        if key in weights and key.startswith(keys.prefix) and value.properties.dtype not in _DTYPES:
            raise InputError(
                f"{folder.weights}: tensor '{key}' is {str(value.properties.dtype)[6:]}; supported are weights in "
                "float32, bfloat16 and float16. Save them in one of these with NeMo (fp8_param=False)"
            )
    vocabulary = find_tokenizer(folder, context)
    rows = keys.shape(EMBEDDING)[0]
    size = vocab_size or context.values.get("vocab_size") or vocabulary.size
    if not isinstance(size, int) or size < 1:
        raise InputError(
            f"{context.source}: says neither vocab_size nor where the tokenizer is, so that the {rows} rows of the "
            "embedding cannot be told from their padding; give --vocab-size"
        )
    if size > rows:
        raise InputError(f"{folder.weights}: the embedding has {rows} rows, but the vocabulary {size} entries")
    architecture = architecture_of(context, size, vocabulary.special)
    common, unread = read_common(folder.weights)
    notes = [unread] if unread else []
    left_out = sorted(key for key in shapes if not key.startswith(keys.prefix))
    if any(key.startswith("optimizer") for key in left_out):
        notes.append("the optimizer's state was left out: training continues from these weights with a fresh one")
    if vocabulary.note:
        notes.append(vocabulary.note)
    if rows != size:
        notes.append(f"{rows - size} rows of padding after the {size} of the vocabulary were left out")
    step = common.get("global_step")
    return Opened(folder, context, architecture, keys, vocabulary, step if isinstance(step, int) else None, notes)


def import_nemo(root: Path, out: Path, vocab_size: int | None = None, strict: bool = False) -> NemoImport:
    """NeMo 2.x checkpoint folder to native checkpoint; weights only.

    Args:
        root: Holds ``weights/`` and ``context/``.
        out: Directory to create.
        vocab_size: Entries of the vocabulary without padding, where the checkpoint does not say.
        strict: Refuse NaN and infinity; otherwise the tensors that hold them are reported.

    Returns:
        What was found.

    Raises:
        InputError: For a checkpoint or output that cannot be used; nothing was written.
        PrismError: If writing failed; nothing is left.
    """
    refuse_existing(out)
    opened = open_checkpoint(root, vocab_size)
    result: NemoImport = run(_worker, opened, str(out), strict, ParallelConfig())
    return result


def _worker(opened: Opened, out: str, strict: bool, parallel: ParallelConfig) -> NemoImport:
    """The work, on the first of however many processes there are."""
    runtime = start(parallel, seed=0)
    final = Path(out)
    try:
        shards, objects = placements(build_empty(opened.architecture, runtime), opened.architecture, 1)
        parts = [(shard, _places(opened.keys, shard)) for shard in shards]
        left = opened.keys.left()
        if left:
            raise InputError(
                f"{opened.folder.weights}: tensor '{left[0]}' has no place in a {opened.architecture.family} model "
                f"({len(left)} in all); dropping it would change the function"
            )
        found: set[str] = set()
        with CheckpointReader(opened.folder.weights) as reader:
            for _, places in parts:
                _check_types(reader, places)
            size = sum(
                torch.Size(shard.shape).numel() * reader.dtype(places[0].key).itemsize for shard, places in parts
            )
            with temporary_folder(final, size) as temporary:

                def work() -> None:
                    with clean_failure(final):
                        record = _write(temporary, _Source(reader, strict, found), parts, objects)
                        _finish(temporary, final, opened, record, sorted(found))

                on_main(work)
    finally:
        stop()
    return NemoImport(opened.architecture.family, opened.step, opened.notes, sorted(found))


def _places(keys: StoredKeys, shard: Shard) -> list[Place]:
    """Where a shard is stored."""
    return keys.places(shard.key, shard.global_shape, shard.offset, shard.stacked, shard.shape[0])


def _check_types(reader: CheckpointReader, places: list[Place]) -> None:
    """Refuse a tensor of ours whose parts are stored in different types; it has one."""
    types = {str(reader.dtype(place.key))[6:]: place.key for place in places}
    if len(types) > 1:
        raise InputError(f"{reader.folder}: parts of one tensor are of different types: {types}")


class _Source:
    """Reads stored rows, and looks for numbers that are not finite."""

    def __init__(self, reader: CheckpointReader, strict: bool, found: set[str]) -> None:
        self.reader, self._strict, self._found = reader, strict, found

    def blocks(self, places: list[Place], tail: tuple[int, ...]) -> Iterator[torch.Tensor]:
        for place in places:
            dtype = self.reader.dtype(place.key)
            for first, rows in blocks_of((place.rows, *tail), dtype):
                block = torch.empty((rows, *tail), dtype=dtype)
                at = list(place.offset)
                at[place.stacked] += first
                self.reader.read(place.key, at, block.view((1,) * place.stacked + tuple(block.shape)))
                if not torch.isfinite(block.sum(dtype=torch.float32)) and not block.isfinite().all():
                    if self._strict:
                        raise InputError(
                            f"{self.reader.folder}: tensor '{place.key}' holds NaN or infinity, and --strict is set"
                        )
                    self._found.add(place.key)
                yield block


def _part(places: list[Place], first: int, rows: int) -> list[Place]:
    """Rows `first` to `first + rows` of consecutive stretches."""
    found, begin = [], 0
    for place in places:
        low, high = max(first, begin), min(first + rows, begin + place.rows)
        if low < high:
            at = list(place.offset)
            at[place.stacked] += low - begin
            found.append(Place(place.key, tuple(at), place.stacked, high - low))
        begin += place.rows
    return found


def _write(temporary: Path, source: _Source, parts: list[tuple[Shard, list[Place]]], objects: list[Any]) -> Record:
    with ChunkWriter(temporary, 0) as writer:
        for shard, places in parts:
            dtype, tail = source.reader.dtype(places[0].key), shard.shape[1:]
            for first, rows in blocks_of(shard.shape, dtype, CHUNK_BYTES):
                sizes = (1,) * shard.stacked + (rows, *tail)
                blocks = read_ahead(source.blocks(_part(places, first, rows), tail))
                writer.tensor(shard.key, dtype, shard.global_shape, shard.at_row(first), sizes, blocks)
        for value in objects:
            writer.object(value.unique_key, value.data)
        writer.finish()
    return writer.record


def _finish(temporary: Path, final: Path, opened: Opened, record: Record, not_finite: list[str]) -> None:
    write_metadata(temporary, [record])
    if opened.vocabulary.folder is not None:
        carry(opened.vocabulary.folder, temporary / CARRIED)
    hashes = dict(record.hashes)
    hashes |= {name: sha256(temporary / name) for name in files_below(temporary) if name not in hashes}
    manifest = {
        "architecture": opened.architecture.to_dict(),
        "versions": versions(),
        "step": 0,
        "has_optimizer": False,
        "stored_tied_head": False,
        "not_finite": not_finite,
        "imported_from": str(opened.folder.root),
        "nemo": {
            "model": opened.context.model_class,
            "config": opened.context.config_class,
            "step": opened.step,
            "notes": opened.notes,
        },
        HASHES: hashes,
    }
    publish(temporary, final, manifest)
