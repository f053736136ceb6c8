"""A NeMo 2.x checkpoint folder: where its parts are, and what kinds of it are refused.

::

    NAME/
      weights/   Megatron's distributed checkpoint: *.distcp, .metadata, common.pt, metadata.json
      context/   io.json, model.yaml and what they point to (the tokenizer's files, pickled objects)

Neither side is trusted: ``.metadata`` is a pickle that `prism_nemo.checkpoint.metadata_file` reads, ``common.pt`` goes
through torch's weights-only loader, and pickled objects of the context are never opened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prism_nemo.errors import InputError

WEIGHTS, CONTEXT = "weights", "context"


@dataclass(frozen=True)
class NemoFolder:
    """The parts of a checkpoint.

    Attributes:
        root: As the user named it.
        weights: Holds the distributed checkpoint.
        context: Holds ``io.json`` or ``model.yaml``.
    """

    root: Path
    weights: Path
    context: Path


def is_nemo_folder(folder: Path) -> bool:
    """Whether a folder looks like a NeMo 2.x checkpoint; `open_folder` says whether it can be used."""
    return (folder / WEIGHTS).is_dir() and (folder / CONTEXT).is_dir()


def open_folder(root: Path) -> NemoFolder:
    """Find the parts of a checkpoint and refuse kinds that this project does not read.

    Raises:
        InputError: Naming what is missing, or the kind.
    """
    if root.name in (WEIGHTS, CONTEXT) and is_nemo_folder(root.parent):
        root = root.parent
    if root.is_file() and root.suffix == ".nemo":
        raise InputError(f"{root}: a .nemo archive is of NeMo 1; convert it to NeMo 2 with NeMo's scripts first")
    for part in (WEIGHTS, CONTEXT):
        if not (root / part).is_dir():
            raise InputError(f"{root}: holds no folder '{part}'; a NeMo 2 checkpoint has {WEIGHTS}/ and {CONTEXT}/")
    folder = NemoFolder(root, root / WEIGHTS, root / CONTEXT)
    if (folder.weights / "adapter_metadata.json").exists():
        raise InputError(f"{root}: holds adapters (PEFT) only; merge them into the base model with NeMo first")
    if any((place / "modelopt_state").exists() for place in (root, folder.weights)):
        raise InputError(f"{root}: was changed by ModelOpt (quantised, pruned or distilled), which is not supported")
    _check_format(folder.weights)
    return folder


def _check_format(weights: Path) -> None:
    path = weights / "metadata.json"
    try:
        kind = json.loads(path.read_text())
        backend = kind["sharded_backend"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; copy the whole checkpoint again") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: expected JSON with a sharded_backend: {error}") from error
    if backend != "torch_dist":
        raise InputError(
            f"{path}: saved in the format '{backend}'; only torch_dist is read. Load it with NeMo and save it again "
            "with save_ckpt_format='torch_dist'"
        )
    if not (weights / "common.pt").is_file():
        raise InputError(f"{weights / 'common.pt'}: no such file; the checkpoint is incomplete")


def read_common(weights: Path) -> tuple[dict[str, Any], str]:
    """``common.pt``: what NeMo saves beside tensors.

    Only the step is of use here, so a file that torch refuses to load safely is passed over, and said.

    Returns:
        Its values, and why there are none, if there are none.
    """
    try:
        values = torch.load(weights / "common.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # what a hostile or damaged file raises is anybody's guess
        return {}, f"common.pt was not read, because it is not safe to ({str(error).splitlines()[0]})"
    return (values, "") if isinstance(values, dict) else ({}, "common.pt holds no mapping")
