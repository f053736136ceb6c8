"""From a finished build to blended samples, by Megatron's own datasets and index builders.

Sources are drawn by their shares at every point of the run: after any number of samples each source is within one or
two samples of its share. A sample is `seq_length + 1` consecutive tokens of shuffled, concatenated documents, so it may
span documents. In this slice attention, positions and loss run across those borders (no resets, nothing masked).

The order depends on `num_samples` too, because Megatron shuffles over as many epochs as the run needs. A run that is to
be continued must ask for the same number again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.utils.data import Dataset

from prism_nemo.data.batches import BatchIterator
from prism_nemo.data.manifest import BuiltTokenizer, Manifest, SourceShare, describe, load_manifest
from prism_nemo.errors import InputError

__all__ = ["BatchIterator", "Blend", "build_blend", "held_out_rows"]

_READY = "ready"


class Blend(Dataset[dict[str, torch.Tensor]]):
    """The samples of a run, in order; exactly as many as were asked for.

    A sample maps `tokens`, `labels`, `position_ids` (seq_length, int64) and `loss_mask` (seq_length, float32); `labels`
    are `tokens` one place on. `position_ids` is shared between samples: do not write into it.

    Attributes:
        names: The sources drawn from.
    """

    def __init__(self, dataset: GPTDataset | BlendedDataset, names: Sequence[str], num_samples: int) -> None:
        self._dataset = dataset
        self._size = num_samples
        self.names = tuple(names)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self._check(index)
        sample = self._dataset[index]
        sample.pop("dataset_id", None)
        return sample

    def source_of(self, index: int) -> str:
        """Returns the name of the source that sample `index` is drawn from.

        Raises:
            IndexError: Outside of the dataset.
        """
        self._check(index)
        if isinstance(self._dataset, BlendedDataset):
            return self.names[int(self._dataset.dataset_index[index])]
        return self.names[0]

    def _check(self, index: int) -> None:
        # Megatron builds a few samples too many and numpy takes negative indices: neither may pass unseen.
        if not 0 <= index < self._size:
            raise IndexError(f"sample {index} of a blend of {self._size} samples")


def build_blend(
    manifest_dir: str | Path,
    *,
    seq_length: int,
    num_samples: int,
    seed: int,
    cache_dir: str | Path,
    include: Sequence[str] | None = None,
) -> Blend:
    """Blends the sources of a build by their shares of tokens.

    With a torch.distributed group every rank must call this: rank 0 writes the index caches, the others read them, so
    `cache_dir` must be one folder that all ranks see. Without a group it runs alone.

    Args:
        manifest_dir: The folder that `build_mixture` wrote.
        seq_length: Tokens per sample; one more is read for the labels.
        num_samples: Samples of the whole run.
        seed: Of the shuffles, 0 or more.
        cache_dir: Where index arrays are kept; created if missing. Belongs to one run at a time.
        include: Names of the sources to draw from, their shares normalised anew; None takes all of positive weight.

    Raises:
        InputError: A bad number, an unknown source, a damaged build, or a source that the run would repeat more often
            than its `max_epochs`.
    """
    for name, value, least in (("seq_length", seq_length, 1), ("num_samples", num_samples, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name}: {value} must be at least {least}.")
    manifest = load_manifest(manifest_dir)
    rows = [row for row in describe(manifest, num_samples * seq_length, include) if row.share > 0]
    _check_epochs(rows, manifest)
    prefixes = [manifest.prefix(row.name) for row in rows]
    shares = [row.share for row in rows]
    cache = _prepare_cache(
        Path(cache_dir).resolve(), [prefixes, shares, seq_length, num_samples, seed, manifest.tokenizer.eos_id]
    )
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[(prefixes, shares), None, None],
        path_to_cache=str(cache),
        # Megatron rounds each source's samples up, and the blend is as long as the sum, so with many sources a heavy
        # one is asked for up to len(rows) samples more than its own rounding gave it.
        mid_level_dataset_surplus=0.005 + 2 * len(rows) / num_samples,
        tokenizer=cast(Any, _DatasetTokenizer(manifest.tokenizer)),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = _Builder(GPTDataset, [num_samples, None, None], lambda: True, config).build()[0]
    if _rank() == 0:
        (cache / _READY).touch()
    return Blend(dataset, [row.name for row in rows], num_samples)


def held_out_rows(
    manifest_dir: str | Path, source: str, seq_length: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns validation rows that are the same whatever the run: evenly spaced over one source, in stored order.

    Args:
        manifest_dir: The folder that `build_mixture` wrote.
        source: Usually one of weight 0.
        seq_length: Tokens per row.
        rows: Number of rows; rows do not overlap, except that a last label may be the next row's first token.

    Returns:
        `(tokens, labels)`, each (rows, seq_length) int64; labels are tokens one place on.

    Raises:
        InputError: Unknown source, a number below 1, or a source with too few tokens.
    """
    if seq_length < 1 or rows < 1:
        raise InputError(f"held-out rows: seq_length {seq_length} and rows {rows} must be at least 1.")
    manifest = load_manifest(manifest_dir)
    item = manifest.source(source)
    if item.tokens < rows * seq_length + 1:
        raise InputError(
            f"source {source!r}: {rows} held-out rows of {seq_length} tokens need {rows * seq_length + 1} tokens, it "
            f"has {item.tokens}; ask for at most {max(0, (item.tokens - 1) // seq_length)} rows or add text."
        )
    stored = IndexedDataset(manifest.prefix(source))
    last = item.tokens - seq_length - 1
    starts = [round(last * row / max(1, rows - 1)) for row in range(rows)]
    width = np.dtype(stored.index.dtype).itemsize
    # Documents lie back to back in the .bin, so a row is one read wherever the borders are.
    read = [stored.bin_reader.read(stored.index.dtype, seq_length + 1, start * width) for start in starts]
    # Copied while `stored` is alive: it unmaps its file when it goes, and a view left over would crash the process.
    text = torch.from_numpy(np.stack(read).astype(np.int64))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


class _DatasetTokenizer:
    """What GPTDataset 0.16.1 asks of a tokenizer: a size, an end of document, and an identity for its cache keys."""

    # GPTDataset zeroes every token that equals `pad` and masks its loss. It never pads here (samples are always full),
    # so a real id could only hide a "<pad>" that somebody wrote in a text. -1 is no token.
    pad = -1

    def __init__(self, tokenizer: BuiltTokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eos_id
        self.unique_identifiers = {"sha256": tokenizer.sha256, "eod": tokenizer.eos_id}


class _Builder(BlendedMegatronDatasetBuilder):
    """Upstream's builder, able to run without a process group."""

    @staticmethod
    def build_generic_dataset(
        cls: type | Callable[..., Any],
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Any:
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            # megatron/core/datasets/blended_dataset.py:141 asks for the rank on a cache miss without looking whether
            # there is a group. Without a cache path it builds in memory: the same arrays, in milliseconds.
            config = copy.copy(args[-1])
            config.path_to_cache = None
            args = (*args[:-1], config)
            # It would warn that it cannot save, which is what is wanted here.
            logger = logging.getLogger(BlendedDataset.__module__)
            level = logger.level
            logger.setLevel(logging.ERROR)
            try:
                return cls(*args)
            finally:
                logger.setLevel(level)
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


def _check_epochs(rows: Sequence[SourceShare], manifest: Manifest) -> None:
    over = [row for row in rows if row.over_limit]
    if over:
        lines = "; ".join(f"{row.name} {row.epochs:.2f} epochs, max_epochs {row.max_epochs:g}" for row in over)
        raise InputError(
            f"mixture {manifest.mixture!r}: the run would repeat sources too often: {lines}. "
            "Train on fewer tokens, lower their weight, add text, or raise max_epochs."
        )


def _prepare_cache(cache_dir: Path, key: list[Any]) -> Path:
    """Returns the folder for one blend's index arrays, emptied if an earlier build of them was killed.

    Megatron takes any existing file for a hit, so half an array, left by a killed run, would be loaded as if whole.
    """
    cache = cache_dir / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if _rank() == 0:
        if cache.exists() and not (cache / _READY).exists():
            shutil.rmtree(cache)
        cache.mkdir(parents=True, exist_ok=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return cache


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
