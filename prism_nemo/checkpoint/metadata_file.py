"""``.metadata`` of a distributed checkpoint: a pickle, read with a list of the few classes that it may name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from prism_nemo.errors import InputError

# What .metadata of torch.distributed.checkpoint is made of, with Megatron's additions.
_PLAIN = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.planner": None,  # Megatron keeps the plan of the save
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device", "strided", "contiguous_format", "preserve_format", "channels_last"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "slice", "complex", "bytearray"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of ``.metadata`` and no others, so that a pickle cannot run anything."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = _PLAIN.get(module, set())
        known = allowed is None or name in allowed or (module == "torch" and isinstance(_dtype(name), torch.dtype))
        # Dots reach into what a module happens to import, such as its `os`.
        if not known or "." in name:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which checkpoint metadata has no use for")
        found = super().find_class(module, name)
        if allowed is None and not (isinstance(found, type) and found.__module__ == module):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which checkpoint metadata has no use for")
        return found


def _dtype(name: str) -> Any:
    return getattr(torch, name, None)


def read_metadata(weights: Path) -> Any:
    """``.metadata`` of a distributed checkpoint from an unknown source.

    Args:
        weights: The folder that holds it.

    Returns:
        `torch.distributed.checkpoint.metadata.Metadata`.

    Raises:
        InputError: If it is missing, damaged, or names anything but metadata.
    """
    path = weights / ".metadata"
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("it is no checkpoint metadata")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; copy the whole checkpoint again") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{path}: not readable as checkpoint metadata: {error}") from error
    return metadata
