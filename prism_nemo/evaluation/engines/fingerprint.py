"""A name for the function that a checkpoint computes, which changes whenever a weight does."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prism_nemo.checkpoint.atomic import HASHES, MANIFEST, read_manifest
from prism_nemo.checkpoint.hashes import sha256
from prism_nemo.errors import InputError

# Files read at a time; hashing leaves the interpreter's lock free.
_READERS = 8


def fingerprint(checkpoint: Path) -> str:
    """Hash of a checkpoint, the same wherever it lies; for keys of a cache.

    - A native checkpoint: of its architecture and the SHA-256 of all its files that the manifest holds since they were
      written, which takes no time. What a disk did to them later is not seen: `prism_nemo.checkpoint.hashes.damage`
      looks for that. Files of checkpoints without recorded hashes are read.
    - A Hugging Face folder: of ``config.json`` and all bytes of its safetensors files. Sizes and samples would be
      quicker, and blind to a step of training that changed few weights.

    The tokenizer is not part of it; its own hash is `prism_nemo.data.tokenizer.Tokenizer.sha256`.

    Args:
        checkpoint: Native checkpoint or Hugging Face folder.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: If it is neither, or a file cannot be read.
    """
    if (checkpoint / MANIFEST).is_file():
        manifest = read_manifest(checkpoint)
        recorded = manifest.get(HASHES) or _hashes(checkpoint, sorted(manifest.get("files", {})))
        facts = {"architecture": manifest.get("architecture"), "files": recorded}
    else:
        weights = sorted(path.name for path in checkpoint.glob("*.safetensors"))
        if not weights:
            raise InputError(f"{checkpoint}: neither a prism-nemo checkpoint nor a folder with safetensors files")
        facts = {"files": _hashes(checkpoint, ["config.json", *weights])}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    try:
        with ThreadPoolExecutor(_READERS) as readers:
            return dict(zip(names, readers.map(lambda name: sha256(folder / name), names), strict=True))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
