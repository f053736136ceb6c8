"""The weights of a checkpoint by their Hugging Face names, a few rows at a time, whatever the checkpoint's layout."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from prism_nemo.analysis.tensor_names import HEAD, component_of
from prism_nemo.checkpoint.safetensors_file import SafetensorsFile
from prism_nemo.errors import InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights(Protocol):
    """What analysis reads of a checkpoint.

    Attributes:
        folder: Of the checkpoint, for messages.
    """

    folder: Path

    def names(self) -> set[str]:
        """Of all tensors."""

    def shape(self, name: str) -> list[int]:
        """Of a tensor."""

    def dtype(self, name: str) -> str:
        """Type in which a tensor is stored, as safetensors names it ("BF16")."""

    def read(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out` [rows, ...] of the stored type with rows from number `first` on. Threads may read at a time."""

    def head_is_tied(self) -> bool:
        """Whether the output layer is the embedding: absent, or stored as an equal copy of it."""


def load(weights: Weights, name: str) -> Tensor:
    """A whole tensor in its stored type."""
    out = torch.empty(weights.shape(name), dtype=DTYPES[weights.dtype(name)])
    weights.read(name, 0, out)
    return out


def open_weights(folder: Path, stack: ExitStack) -> Weights:
    """The weights of a Hugging Face folder or of a native checkpoint.

    Args:
        folder: Holds `model.safetensors`, or shards with `model.safetensors.index.json` (where both are there the
            single file counts, as in transformers), or is a checkpoint of this project, saved at any layout.
        stack: Closes the files.

    Raises:
        InputError: If there is no complete checkpoint, or a file is unreadable or lacks a tensor.
    """
    if not (folder / _SINGLE).is_file() and not (folder / _INDEX).is_file() and (folder / ".metadata").is_file():
        from prism_nemo.analysis.native_weights import NativeWeights  # imports Megatron

        return NativeWeights(folder, stack)
    return FolderWeights(folder, stack)


class FolderWeights:
    """Of a Hugging Face folder; see `open_weights`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        if (folder / _SINGLE).is_file():
            self._open(_SINGLE, stack)
            self._file = dict.fromkeys(self._files[_SINGLE].entries, _SINGLE)
        elif (folder / _INDEX).is_file():
            self._file = self._read_index(folder / _INDEX, stack)
        else:
            raise InputError(
                f"{folder}: no checkpoint here (neither {_SINGLE} nor {_INDEX}, nor a native one); give the folder of "
                "a Hugging Face export in safetensors format, or RUN/checkpoints/step_N"
            )
        if not self._file:
            raise InputError(f"{folder}: the checkpoint holds no tensors; export it again")

    def _open(self, file: str, stack: ExitStack) -> None:
        path = self.folder / file
        try:
            self._files[file] = SafetensorsFile(path)
        except InputError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise InputError(f"{path}: not a readable safetensors file ({reason})") from error
        stack.callback(self._files[file].close)

    def _read_index(self, index: Path, stack: ExitStack) -> dict[str, str]:
        try:
            table = {str(k): str(v) for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: key weight_map is no table of tensor: file; export the model again") from error
        for name, shard in table.items():
            if shard not in self._files:
                if not (self.folder / shard).is_file():
                    raise InputError(
                        f"{self.folder / shard}: missing, though {index.name} places {name} there; copy it"
                    )
                self._open(shard, stack)
            if name not in self._files[shard].entries:
                raise InputError(
                    f"{self.folder / shard}: no tensor {name}, though {index.name} places it there; copy again"
                )
        return table

    def names(self) -> set[str]:
        """See `Weights`."""
        return set(self._file)

    def shape(self, name: str) -> list[int]:
        """See `Weights`."""
        return list(self._files[self._file[name]].entries[name].shape)

    def dtype(self, name: str) -> str:
        """See `Weights`."""
        return self._files[self._file[name]].entries[name].dtype

    def read(self, name: str, first: int, out: Tensor) -> None:
        """See `Weights`."""
        self._files[self._file[name]].read(name, first, out)

    def head_is_tied(self) -> bool:
        """See `Weights`."""
        if HEAD not in self._file:
            return True
        for name in self._file:
            if component_of(name)[1] == "embedding" and self.shape(name) == self.shape(HEAD):
                return _equal(self, name, HEAD)
        return False


def _equal(weights: Weights, a: str, b: str) -> bool:
    """Whether two tensors of one shape are equal, a few rows at a time: real ones differ in the first."""
    shape = weights.shape(a)
    if weights.dtype(a) != weights.dtype(b) or weights.dtype(a) not in DTYPES:
        return False
    rows, dtype = max(1, (1 << 20) // max(1, shape[-1])), DTYPES[weights.dtype(a)]
    for first in range(0, shape[0], rows):
        parts = [torch.empty((min(rows, shape[0] - first), *shape[1:]), dtype=dtype) for _ in (a, b)]
        for name, part in zip((a, b), parts, strict=True):
            weights.read(name, first, part)
        if not torch.equal(*parts):
            return False
    return True
