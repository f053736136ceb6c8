"""Models to look into: a native checkpoint or a Hugging Face folder, whole in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prism_nemo.checkpoint.convert import load_hf_weights
from prism_nemo.checkpoint.hf import HFReader
from prism_nemo.checkpoint.importing import CARRIED
from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines.open import NATIVE, kind_of
from prism_nemo.models.build import build_model
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.family import Architecture, read_hf_config
from prism_nemo.runtime import Runtime


def architecture_of(path: Path) -> Architecture:
    """What a checkpoint is; its files are checked, no weight is read.

    Raises:
        InputError: If there is no whole checkpoint.
    """
    if kind_of(path) == NATIVE:
        return read_architecture(path)
    architecture = read_hf_config(path)
    HFReader(path).check(architecture)
    return architecture


def same_architecture(paths: Sequence[Path]) -> Architecture:
    """The architecture of checkpoints that must all be one function.

    Raises:
        InputError: Naming the checkpoint and all fields in which it differs from the first.
    """
    first = architecture_of(paths[0])
    for path in paths[1:]:
        different = first.differences(architecture_of(path))
        if different:
            raise InputError(f"{path}: is another architecture than {paths[0]}: {'; '.join(different)}")
    return first


def tokenizer_of(path: Path, given: str | Path | None) -> Tokenizer:
    """The tokenizer that was given, else the checkpoint's own.

    Raises:
        InputError: If there is none.
    """
    if given is not None:
        return load_tokenizer(given)
    folder = path / CARRIED if kind_of(path) == NATIVE else path
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{path}: has no tokenizer; name the one that it was trained with: --tokenizer DIR")
    return load_tokenizer(folder)


def fill(model: LanguageModel, path: Path, architecture: Architecture) -> None:
    """Read a checkpoint's weights into this rank's part of a model.

    Args:
        model: Of the same function.
        path: Native checkpoint or Hugging Face folder.
        architecture: Of this checkpoint: the names of a folder's tensors are in it.
    """
    if kind_of(path) == NATIVE:
        load(path, model)
    else:
        load_hf_weights(model, architecture, HFReader(path), model.config.tensor_model_parallel_size)


def open_model(path: Path, runtime: Runtime) -> LanguageModel:
    """A checkpoint's model, without gradients.

    Raises:
        InputError: If it cannot be read.
    """
    architecture = architecture_of(path)
    model = build_model(architecture, runtime)
    fill(model, path, architecture)
    model.eval()
    return model.requires_grad_(False)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that tell checkpoints apart: the last parts of their paths, as many as it takes.

    Raises:
        InputError: If one is named twice.
    """
    whole = [path.resolve() for path in paths]
    if len(set(whole)) != len(whole):
        twice = next(path for path in paths if whole.count(path.resolve()) > 1)
        raise InputError(f"{twice}: is named twice; name different checkpoints")
    for parts in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-parts:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
