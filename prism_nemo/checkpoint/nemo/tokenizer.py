"""The tokenizer of a NeMo context: its folder, and how many entries it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.hf import CARRIED_FILES
from prism_nemo.checkpoint.nemo.context import ModelContext
from prism_nemo.checkpoint.nemo.folder import NemoFolder
from prism_nemo.checkpoint.nemo.io_json import Call

# Where NeMo's importers put the files, inside the context.
TOKENIZER_FOLDER = "nemo_tokenizer"
HF_TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"


@dataclass(frozen=True)
class Vocabulary:
    """What a context says of its tokenizer.

    Attributes:
        folder: With Hugging Face's tokenizer files, inside the context; None if there are none.
        size: Entries, added ones included; None where that is not known.
        special: ``bos_token_id`` and ``eos_token_id``, as far as they are known.
        note: What a user has to know, or nothing.
    """

    folder: Path | None
    size: int | None
    special: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files, in any of Hugging Face's spellings."""
    return any((folder / name).is_file() for name in CARRIED_FILES if name != "generation_config.json")


def find_tokenizer(folder: NemoFolder, context: ModelContext) -> Vocabulary:
    """Find the tokenizer's files; code of a tokenizer is never run, and nothing outside the context is read."""
    path = _named(folder, context.tokenizer)
    if path is None:
        path = folder.context / TOKENIZER_FOLDER
    if not has_tokenizer(path):
        return Vocabulary(None, None, note="no tokenizer files came along; exports need --tokenizer")
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a tokenizer's files can be wrong in
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        return Vocabulary(path, None, note=f"the tokenizer in {path} does not load ({cause}); its files came along")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return Vocabulary(path, len(tokenizer), {key: value for key, value in ids.items() if isinstance(value, int)})


def _named(folder: NemoFolder, tokenizer: Any) -> Path | None:
    """The folder that the context names, if it is one of its own."""
    if not (isinstance(tokenizer, Call) and tokenizer.target == HF_TOKENIZER):
        return None
    name = tokenizer.arguments.get("pretrained_model_name")
    if not isinstance(name, str):
        return None
    inside, path = folder.context.resolve(), (folder.context / name).resolve()
    return path if path.is_relative_to(inside) and path != inside else None
