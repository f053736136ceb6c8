"""The weights of a native checkpoint by their Hugging Face names."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from prism_nemo.analysis.sources import DTYPES
from prism_nemo.analysis.tensor_names import HEAD
from prism_nemo.checkpoint.atomic import read_manifest
from prism_nemo.checkpoint.distcp_reader import CheckpointReader
from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.checkpoint.placement import Segment, build_empty, placements, segments
from prism_nemo.config import ParallelConfig
from prism_nemo.runtime import Runtime, start, stop
from prism_nemo.runtime.launch import launch

Places = dict[str, tuple[tuple[int, ...], list[Segment]]]  # by Hugging Face name: shape, and the stretches of its rows
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class NativeWeights:
    """Of a native checkpoint; see `prism_nemo.analysis.sources.open_weights`. Padding of the vocabulary is left out."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        read_manifest(folder)  # refuses a checkpoint that is still being written
        # A process of its own lays out groups without leaving them behind; where they are there, it is not needed.
        alone = dist.is_initialized() and dist.get_world_size() == 1
        places: Places = _places(str(folder)) if alone else launch(_in_a_process, str(folder))
        self._shapes = {name: list(shape) for name, (shape, _) in places.items()}
        self._segments = {name: parts for name, (_, parts) in places.items()}
        self._reader = stack.enter_context(CheckpointReader(folder))
        self._lock = threading.Lock()  # the reader opens files and finds chunks as they are asked for

    def names(self) -> set[str]:
        """See `prism_nemo.analysis.sources.Weights`."""
        return set(self._shapes)

    def shape(self, name: str) -> list[int]:
        """See `prism_nemo.analysis.sources.Weights`."""
        return list(self._shapes[name])

    def dtype(self, name: str) -> str:
        """See `prism_nemo.analysis.sources.Weights`."""
        dtype = self._reader.dtype(self._segments[name][0].key)
        return _NAMES.get(dtype, str(dtype))

    def read(self, name: str, first: int, out: Tensor) -> None:
        """See `prism_nemo.analysis.sources.Weights`."""
        last = first + len(out)
        for part in self._segments[name]:
            low, high = max(first, part.row), min(last, part.row + part.rows)
            if low >= high:
                continue
            offset = list(part.offset)
            offset[part.stacked] += low - part.row
            into = out[low - first : high - first]
            with self._lock:
                self._reader.read(part.key, offset, into.view((1,) * part.stacked + tuple(into.shape)))

    def head_is_tied(self) -> bool:
        """See `prism_nemo.analysis.sources.Weights`."""
        return HEAD not in self._shapes


def _places(folder: str) -> Places:
    """Where each Hugging Face tensor's rows lie in a checkpoint; in a process with groups for itself alone."""
    architecture = read_architecture(Path(folder))
    runtime = Runtime(torch.device("meta"), ParallelConfig(), 0, 1, torch.float32, transformer_engine=False)
    shards, _ = placements(build_empty(architecture, runtime), architecture, 1)
    return segments(shards)


def _in_a_process(folder: str) -> Places:
    start(ParallelConfig(), seed=0)
    try:
        return _places(folder)
    finally:
        stop()
