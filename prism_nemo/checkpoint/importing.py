"""What each process of an import does: read its rows, write them into the checkpoint, agree that all went well."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from prism_nemo.checkpoint.atomic import HASHES, publish
from prism_nemo.checkpoint.distcp import CHUNK_BYTES, ChunkWriter, Record, write_metadata
from prism_nemo.checkpoint.files import begin, clean_failure, read_ahead
from prism_nemo.checkpoint.hashes import files_below, sha256
from prism_nemo.checkpoint.hf import CARRIED_FILES, HFReader, blocks_of
from prism_nemo.checkpoint.placement import Shard, build_empty, placements
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.family import Architecture
from prism_nemo.run import versions
from prism_nemo.runtime import start, stop

T = TypeVar("T")
# Tokenizer and generation settings of the imported folder, inside the checkpoint.
CARRIED = "hf"


@dataclass(frozen=True)
class ImportReport:
    """What an import found.

    Attributes:
        bytes: Of all weights.
        not_finite: Hugging Face tensors that hold NaN or infinity.
        skipped: Hugging Face tensors that are no weights and were left out.
    """

    bytes: int = 0
    not_finite: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def together(action: Callable[[], T]) -> list[T]:
    """Do something on every rank; what all of them returned.

    Raises:
        PrismError: On every rank, what the first of them that failed raised.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except PrismError as problem:
        error = problem
    except Exception as problem:
        error = PrismError(f"{type(problem).__name__}: {problem}")
        error.__cause__ = problem
    outcomes: list[Any] = [None] * dist.get_world_size()
    if len(outcomes) == 1:
        outcomes = [(result, error)]
    else:
        dist.all_gather_object(outcomes, (result, error))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [value for value, _ in outcomes]


def on_main(action: Callable[[], T]) -> T:
    """Do something on rank 0 only; its result, or its error, on every rank."""
    values = together(lambda: action() if dist.get_rank() == 0 else None)
    return values[0]  # type: ignore[return-value]


@contextlib.contextmanager
def temporary_folder(final: Path, size: int) -> Iterator[Path]:
    """The folder, the same on every rank, that will become `final`; gone if the block fails on any of them.

    Raises:
        InputError: See `prism_nemo.checkpoint.files.begin`.
    """
    temporary = on_main(lambda: begin(final, size))
    try:
        yield temporary
    except Exception:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def import_worker(
    hf_dir: str, out: str, architecture: Architecture, strict: bool, manifest: dict[str, Any], parallel: ParallelConfig
) -> ImportReport:
    """One rank's share of an import; see `prism_nemo.checkpoint.convert.import_hf`."""
    runtime = start(parallel, seed=0)
    final, tp = Path(out), parallel.tensor_model_parallel_size
    reader = HFReader(Path(hf_dir))
    model = build_empty(architecture, runtime)
    shards, objects = placements(model, architecture, tp)
    mine = sorted((shard for shard in shards if shard.writes), key=lambda s: reader.position(s.sources[0]))
    part = Part(reader, parallel_rank(), tp, strict)
    total = sum(together(lambda: sum(part.size(shard) for shard in mine)))
    try:
        with temporary_folder(final, total) as temporary:
            written = together(lambda: _write(temporary, final, part, mine, objects))
            report = ImportReport(total, sorted({n for _, names in written for n in names}), reader.skipped())
            record = {
                "architecture": architecture.to_dict(),
                "versions": versions(),
                "step": 0,
                "has_optimizer": False,
                "stored_tied_head": reader.tied_head(architecture),
                "not_finite": report.not_finite,
                **manifest,
            }
            on_main(lambda: _finish(temporary, final, reader, [r for r, _ in written], record))
    finally:
        stop()
    return report


def parallel_rank() -> int:
    """This process's tensor-parallel rank."""
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_rank())


def _write(
    temporary: Path, final: Path, part: Part, shards: list[Shard], objects: list[Any]
) -> tuple[Record, set[str]]:
    with clean_failure(final), ChunkWriter(temporary, dist.get_rank()) as writer:
        for shard in shards:
            dtype = part.dtype(shard)
            for first, rows in blocks_of(shard.shape, dtype, CHUNK_BYTES):
                sizes = (1,) * shard.stacked + (rows, *shard.shape[1:])
                blocks = read_ahead(part.blocks(shard, first, rows))
                writer.tensor(shard.key, dtype, shard.global_shape, shard.at_row(first), sizes, blocks)
        for value in objects:
            writer.object(value.unique_key, value.data)
        writer.finish()
    return writer.record, part.not_finite


def _finish(temporary: Path, final: Path, reader: HFReader, records: list[Record], manifest: dict[str, Any]) -> None:
    with clean_failure(final):
        write_metadata(temporary, records)
        carry(reader.folder, temporary / CARRIED)
        hashes = {name: value for record in records for name, value in record.hashes.items()}
        # What is left is small: the metadata, and tokenizer files.
        hashes |= {name: sha256(temporary / name) for name in files_below(temporary) if name not in hashes}
        publish(temporary, final, {**manifest, HASHES: hashes})


def carry(source: Path, target: Path) -> None:
    """Copy tokenizer and generation settings, if there are any."""
    for name in CARRIED_FILES:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


class Part:
    """What this rank reads.

    Args:
        reader: The folder.
        rank: Tensor-parallel rank.
        size: Tensor-parallel size.
        strict: Refuse numbers that are not finite.

    Attributes:
        not_finite: Names of tensors with such numbers, so far.
    """

    def __init__(self, reader: HFReader, rank: int, size: int, strict: bool) -> None:
        self.reader, self.rank, self.tp_size, self.strict = reader, rank, size, strict
        self.not_finite: set[str] = set()

    def dtype(self, shard: Shard) -> torch.dtype:
        """Type of a shard: that of its tensors, which are of one type."""
        return self.reader.dtype(shard.sources[0])

    def size(self, shard: Shard) -> int:
        """Bytes of a shard."""
        return torch.Size(shard.shape).numel() * self.dtype(shard).itemsize

    def blocks(self, shard: Shard, first: int, rows: int) -> Iterator[torch.Tensor]:
        """Rows of a shard, block by block, each in memory of its own."""
        dtype, tail = self.dtype(shard), shard.shape[1:]
        for begun, count in blocks_of((rows, *tail), dtype):
            block = torch.empty((count, *tail), dtype=dtype)
            row = shard.first + first + begun
            self.reader.read_part(shard.mapping, shard.sources, self.rank, self.tp_size, row, block)
            # A sum is finite unless a number is not, or it overflowed: one cheap pass, then a closer look.
            if not torch.isfinite(block.sum(dtype=torch.float32)):
                self._look(shard, row, block)
            yield block

    def _look(self, shard: Shard, first: int, block: torch.Tensor) -> None:
        """Find the tensors of a block that hold numbers that are not finite."""
        row = 0
        for run in shard.mapping.runs(self.rank, self.tp_size):
            part = block[max(0, row - first) : max(0, row + run.rows - first)]
            row += run.rows
            if run.source is None or part.isfinite().all():
                continue
            name = shard.sources[run.source]
            if self.strict:
                raise InputError(f"{self.reader.folder}: tensor '{name}' holds NaN or infinity, and --strict is set")
            self.not_finite.add(name)


def fill_world(parallel: ParallelConfig) -> ParallelConfig:
    """The layout over the processes that torchrun or Slurm started, if any; spare ones are data-parallel.

    Raises:
        InputError: If their number is no multiple of what the layout needs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else parallel.world_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world % (tp * pp):
        raise InputError(f"--tp {tp} --pp {pp} needs a multiple of {tp * pp} processes, but {world} were started")
    return ParallelConfig(tp, pp, world // (tp * pp))
