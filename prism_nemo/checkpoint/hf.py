"""The tensors of a Hugging Face folder, checked first and then read by rows and columns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from prism_nemo.checkpoint.safetensors_file import SafetensorsFile, as_bytes
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, table_of
from prism_nemo.models.weights import WeightMapping, expand

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "lm_head.weight"
# Buffers that old checkpoints carry; they are recomputed from the configuration.
_BUFFERS = ("rotary_emb.inv_freq",)
# Read at a time: fits a core's cache, so that looking for NaN costs little beside the copy.
BLOCK_BYTES = 2 * 2**20
CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


class HFReader:
    """The tensors of a Hugging Face folder. Opening it reads headers only.

    Args:
        folder: Holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Raises:
        InputError: If a file is missing, damaged, outside the folder, or not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = self._weight_map()
        self._where: dict[str, SafetensorsFile] = {}
        for name in sorted(set(files.values())) or [SINGLE]:
            path = folder / name
            if not path.is_symlink() and not path.exists():
                raise InputError(f"{path}: missing, but named by {INDEX}; download it")
            file = SafetensorsFile(path)
            for tensor in file.entries:
                if tensor in self._where:
                    raise InputError(f"{path}: tensor '{tensor}' is also in {self._where[tensor].path.name}")
                if files and tensor not in files:
                    raise InputError(f"{path}: holds tensor '{tensor}', which {INDEX} does not list")
                self._where[tensor] = file
        for tensor, name in files.items():
            if tensor not in self._where or self._where[tensor].path.name != name:
                raise InputError(f"{folder / name}: lacks '{tensor}', which {INDEX} promises; download it again")

    def _weight_map(self) -> dict[str, str]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.is_file() and single.is_file():
            raise InputError(f"{self.folder}: has both {INDEX} and {SINGLE}; remove the one that is not the model")
        if not index.is_file():
            if single.is_symlink() or single.is_file():
                return {}
            pickles = [p.name for kind in ("*.bin", "*.pt", "*.pth") for p in sorted(self.folder.glob(kind))]
            if pickles:
                raise InputError(
                    f"{self.folder}: only pickled weights ({pickles[0]}), which can run code and are never read; "
                    "download the model's safetensors files, or convert it with transformers' save_pretrained"
                )
            raise InputError(f"{self.folder}: neither {SINGLE} nor {INDEX} found; download the safetensors files")
        try:
            files = json.loads(index.read_text())["weight_map"]
            if not files or not all(isinstance(name, str) for name in files.values()):
                raise TypeError("weight_map is not a mapping of tensors to files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not a safetensors index: {error}") from error
        for name in files.values():
            if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
                raise InputError(f"{index}: names '{name}'; only safetensors files in the same folder are read")
        return dict(files)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._where:
            raise InputError(f"{self.folder}: tensor '{name}' is missing; the download is incomplete or not this model")
        return self._where[name]

    def dtype(self, name: str) -> torch.dtype:
        """Type of one tensor, from the file's header.

        Raises:
            InputError: If it is no supported type, or the tensor is missing.
        """
        return self._file(name).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the file's header."""
        return self._file(name).entries[name].shape

    def position(self, name: str) -> tuple[str, int]:
        """File and first byte of one tensor: reading in this order is reading from front to back."""
        file = self._file(name)
        return file.path.name, file.entries[name].start

    def read(self, name: str, first: int, out: torch.Tensor, columns: tuple[int, int] | None = None) -> None:
        """Rows of one tensor into `out`; see `SafetensorsFile.read`."""
        self._file(name).read(name, first, out, columns)

    def get(self, name: str) -> torch.Tensor:
        """One tensor, whole.

        Raises:
            InputError: If the folder does not hold it.
        """
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read(name, 0, tensor)
        return tensor

    def tied_head(self, architecture: Architecture) -> bool:
        """Whether the folder stores an output layer although it is the embedding."""
        return architecture.tied_embeddings and HEAD in self._where

    def skipped(self) -> list[str]:
        """Tensors that are no weights and are not converted."""
        return sorted(name for name in self._where if name.endswith(_BUFFERS))

    def check(self, architecture: Architecture) -> None:
        """Refuse a folder whose tensors are not those of the architecture, in name, shape or type.

        Raises:
            InputError: Naming the first such tensor.
        """
        expected: dict[str, tuple[int, ...]] = {}
        types: dict[str, dict[torch.dtype, str]] = {}
        for mapping, layer in expand(table_of(architecture)):
            sources = mapping.at(layer)[1]
            expected.update(zip(sources, mapping.hf_shapes(), strict=True))
            for name in sources:
                if name in self._where:
                    types.setdefault(mapping.megatron, {}).setdefault(self.dtype(name), name)
        missing = sorted(set(expected) - self.names())
        if missing:
            raise InputError(f"{self.folder}: tensor '{missing[0]}' is missing ({len(missing)} in all)")
        tied = {HEAD} if architecture.tied_embeddings else set()
        extra = sorted(self.names() - set(expected) - tied - set(self.skipped()))
        if extra:
            raise InputError(
                f"{self.folder}: tensor '{extra[0]}' is not mapped by the {architecture.family} family; "
                "dropping it would change the function"
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise InputError(
                    f"{self.folder}: tensor '{name}' has shape {self.shape(name)}, but config.json implies {shape}"
                )
        for found in types.values():
            if len(found) > 1:
                one, other = itertools.islice(found.items(), 2)
                raise InputError(
                    f"{self.folder}: '{one[1]}' is {str(one[0])[6:]} but '{other[1]}' is {str(other[0])[6:]}; they "
                    "become parts of one stored tensor, which has one type"
                )
        if self.tied_head(architecture):
            self._check_tied(architecture)

    def _check_tied(self, architecture: Architecture) -> None:
        embedding = embedding_name(architecture)
        if self.shape(HEAD) != self.shape(embedding) or self.dtype(HEAD) != self.dtype(embedding):
            equal = False
        else:
            blocks = zip(self._blocks(embedding), self._blocks(HEAD), strict=True)
            equal = all((as_bytes(a) == as_bytes(b)).all() for a, b in blocks)
        if not equal:
            raise InputError(f"{self.folder}: tie_word_embeddings is true, but {HEAD} differs from the embedding")

    def _blocks(self, name: str) -> Iterator[torch.Tensor]:
        shape = self.shape(name)
        for first, rows in blocks_of(shape, self.dtype(name)):
            out = torch.empty((rows, *shape[1:]), dtype=self.dtype(name))
            self.read(name, first, out)
            yield out

    def read_part(
        self,
        mapping: WeightMapping,
        sources: tuple[str, ...],
        rank: int,
        size: int,
        first: int,
        out: torch.Tensor,
    ) -> None:
        """Rows of the rank's part of a parameter, straight from the files.

        Args:
            mapping: The parameter.
            sources: Names of its tensors, in the order of ``mapping.hf``.
            rank: Tensor-parallel rank.
            size: Tensor-parallel size.
            first: First row of the part.
            out: [rows, ...], contiguous, of the tensors' type.
        """
        columns = mapping.columns(rank, size) if out.dim() > 1 else None
        row, last = 0, first + len(out)
        for run in mapping.runs(rank, size):
            low, high = max(first, row), min(last, row + run.rows)
            if low < high:
                part = out[low - first : high - first]
                if run.source is None:
                    part.zero_()
                else:
                    self.read(sources[run.source], run.start + low - row, part, columns)
            row += run.rows


def embedding_name(architecture: Architecture) -> str:
    """Hugging Face name of the embedding."""
    return next(m.hf[0] for m in table_of(architecture) if m.megatron == "embedding.word_embeddings.weight")


def blocks_of(shape: tuple[int, ...], dtype: torch.dtype, limit: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """(first row, rows) of pieces of at most `limit` bytes, or of one row."""
    rows = shape[0] if shape else 1
    row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()
    step = max(1, limit // max(1, row_bytes))
    return [(first, min(step, rows - first)) for first in range(0, rows, step)]
