"""Hugging Face folders: read tensor by tensor, write in shards."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prism_nemo.checkpoint.atomic import temporary_name
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, family_named
from prism_nemo.models.weights import WeightMapping

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Buffers that old checkpoints carry; they are recomputed from the configuration.
_BUFFERS = ("rotary_emb.inv_freq",)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


class HFReader:
    """The tensors of a Hugging Face folder, opened lazily.

    Args:
        folder: Holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Raises:
        InputError: If a file is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            try:
                files = json.loads((folder / INDEX).read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise InputError(f"{folder / INDEX}: not a safetensors index: {error}") from error
        elif (folder / SINGLE).is_file():
            files = {}
        else:
            raise InputError(f"{folder}: neither {SINGLE} nor {INDEX} found; download the model's safetensors files")
        self._handles: dict[str, Any] = {}
        for name in sorted(set(files.values())) or [SINGLE]:
            path = folder / name
            if not path.is_file():
                raise InputError(f"{path}: missing, but named by {INDEX}; download it")
            try:
                self._handles[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise InputError(f"{path}: truncated or not a safetensors file ({error}); download it again") from error
        self._where = {name: file for file, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118
        absent = sorted(name for name, file in files.items() if self._where.get(name) != file)
        if absent:
            raise InputError(
                f"{folder / files[absent[0]]}: lacks '{absent[0]}', which {INDEX} promises; download it again"
            )

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def get(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            InputError: If the folder does not hold it.
        """
        if name not in self._where:
            raise InputError(f"{self.folder}: tensor '{name}' is missing; the download is incomplete or not this model")
        try:
            return self._handles[self._where[name]].get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self.folder / self._where[name]}: '{name}': {error}; download it again") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the file's header."""
        return tuple(self._handles[self._where[name]].get_slice(name).get_shape())

    def check(self, architecture: Architecture) -> None:
        """Refuse a folder that has tensors that the family does not map, lacks some, or has some in another shape.

        Raises:
            InputError: Naming the first such tensor.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for mapping, layer in expand(table_of(architecture), architecture):
            expected.update(zip(mapping.at(layer)[1], mapping.hf_shapes(), strict=True))
        missing = sorted(set(expected) - self.names())
        if missing:
            raise InputError(f"{self.folder}: tensor '{missing[0]}' is missing ({len(missing)} in all)")
        tied = {"lm_head.weight"} if architecture.tied_embeddings else set()
        extra = sorted(n for n in self.names() - set(expected) - tied if not n.endswith(_BUFFERS))
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
        if tied <= self.names() and tied:
            embedding, head = self.get("model.embed_tokens.weight"), self.get("lm_head.weight")
            if not torch.equal(embedding, head):
                raise InputError(
                    f"{self.folder}: tie_word_embeddings is true, but lm_head.weight differs from the embedding"
                )


def table_of(architecture: Architecture, tensor_model_parallel_size: int = 1) -> list[WeightMapping]:
    """The family's weight table for this architecture."""
    padded = architecture.padded_vocab_size(tensor_model_parallel_size)
    return family_named(architecture.family).weight_table(architecture, padded)


def parameter_count(architecture: Architecture) -> int:
    """Parameters of the whole model, from the weight table."""
    return sum(math.prod(mapping.shape) for mapping, _ in expand(table_of(architecture), architecture))


def expand(table: Iterable[WeightMapping], architecture: Architecture) -> Iterator[tuple[WeightMapping, int | None]]:
    """Each mapping with each layer that it stands for (None where it stands for no layer)."""
    for mapping in table:
        if mapping.per_layer:
            for layer in range(architecture.num_layers):
                yield mapping, layer
        else:
            yield mapping, None


def write_hf(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: dict[str, Any],
    out: Path,
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a Hugging Face folder, one shard in memory at a time.

    Args:
        tensors: Names and tensors, in the order to write.
        config: Contents of ``config.json``.
        out: Folder to create.
        tokenizer: Folder whose tokenizer files are copied, if any.
        max_shard_bytes: A new file is begun before this size would be passed.

    Raises:
        InputError: If `out` exists.
    """
    if out.exists():
        raise InputError(f"{out}: already exists; remove it or choose another folder")
    temporary = temporary_name(out)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        save_file(pending, temporary / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu").contiguous().clone()
        bytes_ = tensor.numel() * tensor.element_size()
        if pending and size + bytes_ > max_shard_bytes:
            flush()
        pending[name] = tensor
        size, total = size + bytes_, total + bytes_
    flush()
    if len(shards) == 1:
        (temporary / "part-0.safetensors").rename(temporary / SINGLE)
    else:
        where = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (temporary / f"part-{i}.safetensors").rename(temporary / file)
            where.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (temporary / INDEX).write_text(json.dumps(index, indent=2))
    (temporary / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, temporary / name)
    temporary.rename(out)
