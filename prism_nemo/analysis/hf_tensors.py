"""The tensors of a Hugging Face checkpoint folder, one at a time, and what part of a model a tensor name means.

Reading needs memory for one tensor, not for the model: the files stay on disk (memory mapped) until a tensor is asked
for. The names are those of the supported families (Llama, Mistral, Granite 3 and 4, Nemotron-H).
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prism_nemo.errors import InputError

HEAD = "lm_head.weight"

# Module name -> (coarse group, component). The head is grouped with the embedding, as in Table 23.
_MODULES: dict[str, tuple[str, str]] = {
    "q_proj": ("attention", "attention.q"),
    "k_proj": ("attention", "attention.k"),
    "v_proj": ("attention", "attention.v"),
    "o_proj": ("attention", "attention.o"),
    "qkv_proj": ("attention", "attention.qkv"),
    "gate_proj": ("mlp", "mlp.gate"),
    "up_proj": ("mlp", "mlp.up"),
    "down_proj": ("mlp", "mlp.down"),
    "gate_up_proj": ("mlp", "mlp.gate_up"),
    "input_linear": ("mlp", "mlp.gate_up"),  # Granite 4: gate and up in one matrix
    "output_linear": ("mlp", "mlp.down"),
    "gate": ("mlp", "mlp.router"),
    "in_proj": ("mamba", "mamba.in_proj"),
    "out_proj": ("mamba", "mamba.out_proj"),
    "conv1d": ("mamba", "mamba.conv1d"),
    "A_log": ("mamba", "mamba.a_dt"),
    "dt_bias": ("mamba", "mamba.a_dt"),
    "D": ("mamba", "mamba.d"),
    "embed_tokens": ("embedding", "embedding"),
    "embeddings": ("embedding", "embedding"),  # Nemotron-H
    "lm_head": ("embedding", "head"),
}


def component_of(name: str) -> tuple[str, str]:
    """Coarse group and component of a Hugging Face tensor name.

    Returns:
        For example `("attention", "attention.q")`. The groups are attention, mlp, mamba, embedding (with the head),
        norm and other; the gated norm inside a Mamba mixer is a norm. A bias belongs to the component of its matrix.
    """
    parts = name.split(".")
    module = parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
    if "norm" in module or module.startswith("ln_"):
        return "norm", "norm"
    group, component = _MODULES.get(module, ("other", "other"))
    if group == "mamba" and "attn" in name:  # some families call the attention output `out_proj` too
        return "attention", "attention.o" if module == "out_proj" else "attention.qkv"
    return group, component


def layer_of(name: str) -> str | None:
    """Layer index in a Hugging Face tensor name, as the string that the JSON form uses; None outside the layers."""
    match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    return match[1] if match else None


class TensorFolder:
    """The tensors of a Hugging Face folder by name.

    Args:
        folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`. Where both are there the
            single file counts, as in transformers.
        stack: closes the files.

    Raises:
        InputError: neither file is there, a file is unreadable, or a shard or a tensor that the index names is missing.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        self._handles: dict[str, Any] = {}
        if single.is_file():
            self._open(single.name, stack)
            self._file = dict.fromkeys(self._handles[single.name].keys(), single.name)
        elif index.is_file():
            self._file = self._read_index(index, stack)
        else:
            raise InputError(
                f"{folder}: no checkpoint here (neither {single.name} nor {index.name}); "
                "give the folder of a Hugging Face export in safetensors format"
            )
        if not self._file:
            raise InputError(f"{folder}: the checkpoint holds no tensors; export it again")

    def _open(self, file: str, stack: ExitStack) -> None:
        path = self.folder / file
        try:
            self._handles[file] = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error}); copy or export it again") from error

    def _read_index(self, index: Path, stack: ExitStack) -> dict[str, str]:
        try:
            table = {str(k): str(v) for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: key weight_map is no table of tensor: file; export the model again") from error
        for name, shard in table.items():
            if shard not in self._handles:
                if not (self.folder / shard).is_file():
                    raise InputError(
                        f"{self.folder / shard}: missing, though {index.name} places {name} there; copy it"
                    )
                self._open(shard, stack)
        held = {shard: set(handle.keys()) for shard, handle in self._handles.items()}
        for name, shard in table.items():
            if name not in held[shard]:
                raise InputError(
                    f"{self.folder / shard}: no tensor {name}, though {index.name} places it there; copy again"
                )
        return table

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file)

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor, read from the header."""
        return list(self._handles[self._file[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor as safetensors names it ("BF16", "F32"), read from the header."""
        return str(self._handles[self._file[name]].get_slice(name).get_dtype())

    def load(self, name: str) -> Tensor:
        """The tensor, in its stored type, on the CPU."""
        return self._handles[self._file[name]].get_tensor(name)

    def head_is_tied(self) -> bool:
        """Whether the head is the embedding: absent from the file, or stored as an equal copy of it."""
        if HEAD not in self._file:
            return True
        for name in self._file:
            if component_of(name)[1] == "embedding" and self.shape(name) == self.shape(HEAD):
                return torch.equal(self.load(name), self.load(HEAD))
        return False
