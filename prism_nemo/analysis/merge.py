"""`merge`: a new Hugging Face folder from the weights of several models, streamed tensor by tensor.

A few tensors are in memory at a time. The folder appears whole or not at all, with the tokenizer and configuration of
one parent and a `merge.json` that says what it was made of.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prism_nemo.analysis.merge_methods import Recipe, place_by_place, recipe_of
from prism_nemo.analysis.sources import DTYPES, Weights, load, open_weights
from prism_nemo.analysis.tensor_names import HEAD
from prism_nemo.checkpoint.atomic import publish_folder
from prism_nemo.checkpoint.convert import refuse_existing
from prism_nemo.checkpoint.exporting import hf_config
from prism_nemo.checkpoint.files import begin, clean_failure
from prism_nemo.checkpoint.hf import blocks_of
from prism_nemo.checkpoint.hf_writer import DEFAULT_SHARD_BYTES, Planned, plan_files, write_file, write_index
from prism_nemo.checkpoint.importing import CARRIED, carry
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.engines.fingerprint import fingerprint
from prism_nemo.evaluation.engines.open import NATIVE, architecture_of, kind_of
from prism_nemo.models.family import Architecture
from prism_nemo.run import versions

LINEAGE = "merge.json"
_LISTED = 10  # differences in a message


@dataclass(frozen=True)
class MergeSettings:
    """One merge.

    Attributes:
        models: Parents, Hugging Face folders or native checkpoints; for task_arithmetic and ties the base first.
        out: Folder to create.
        method: linear, task_arithmetic, ties or slerp.
        weights: See `prism_nemo.analysis.merge_methods.recipe_of`; of two models in a linear merge or slerp, one number
            is the first one's share: 0.15 for base and mid-trained is the study's merge.
        density: ties: share of each update that is kept.
        carry_from: Parent whose configuration and tokenizer go into the new folder; the last one if not given.
        max_shard_bytes: Size that a file does not pass unless it holds a single tensor.
    """

    models: tuple[str, ...]
    out: str
    method: str = "linear"
    weights: tuple[float, ...] = ()
    density: float = 0.2
    carry_from: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


def merge_models(settings: MergeSettings, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Merge models of one architecture, vocabulary and type.

    Args:
        settings: What to merge.
        progress: Told bytes written and bytes in all.

    Returns:
        What `merge.json` says: ``method``, ``weights``, ``parents`` with their hashes, ``carried_from``, ...

    Raises:
        InputError: For parents that do not fit together (with a list of what differs), weights that make no sense, or
            an `out` that exists; nothing was written.
        PrismError: If writing failed, or a weight is not finite; nothing is left.
    """
    paths, final = [Path(model) for model in settings.models], Path(settings.out)
    recipe = recipe_of(settings.method, len(paths), settings.weights, settings.density)
    refuse_existing(final)
    carried = paths[-1] if settings.carry_from is None else Path(settings.carry_from)
    if carried not in paths:
        raise InputError(f"--carry-from {carried}: is none of the models that are merged")
    architectures = [architecture_of(path) for path in paths]
    with ExitStack() as stack:
        parents = [open_weights(path, stack) for path in paths]
        names = _names(parents, architectures)
        notes = _check_tokenizers(paths)
        hashes = [fingerprint(path) for path in paths]
        record = {
            "method": recipe.method,
            "weights": list(recipe.weights),
            **({"density": recipe.density} if recipe.method == "ties" else {}),
            "parents": [{"path": str(path), "hash": found} for path, found in zip(paths, hashes, strict=True)],
            "carried_from": str(carried),
            "notes": notes,
            "tensors": len(names),
            "versions": versions(),
        }
        _write(settings, recipe, parents, names, architectures[paths.index(carried)], carried, final, record, progress)
    return record


def _names(parents: Sequence[Weights], architectures: Sequence[Architecture]) -> list[str]:
    """The tensors to merge; refuses parents that do not have the same ones."""
    first, wrong = parents[0], []
    for parent, architecture in zip(parents[1:], architectures[1:], strict=True):
        wrong += [f"{parent.folder}: {line}" for line in architectures[0].differences(architecture)]
    held = [{name for name in parent.names() if not name.endswith("rotary_emb.inv_freq")} for parent in parents]
    if all(architecture.tied_embeddings for architecture in architectures):
        # Some files hold a copy of a tied head, which is checked to be the embedding; it stays if all of them do.
        held = [own if all(HEAD in other for other in held) else own - {HEAD} for own in held]
    for parent, own in zip(parents[1:], held[1:], strict=True):
        wrong += [f"{parent.folder}: lacks {name}" for name in sorted(held[0] - own)]
        wrong += [f"{parent.folder}: has {name}, {first.folder} has not" for name in sorted(own - held[0])]
        for name in sorted(held[0] & own):
            for what, ours, theirs in (
                ("shape", first.shape(name), parent.shape(name)),
                ("type", first.dtype(name), parent.dtype(name)),
            ):
                if ours != theirs:
                    wrong.append(f"{parent.folder}: {name} has {what} {theirs}, in {first.folder} {ours}")
    wrong += [
        f"{first.folder}: {name} is of type {first.dtype(name)}, which cannot be merged"
        for name in sorted(held[0])
        if first.dtype(name) not in DTYPES
    ]
    if wrong:
        more = f"\n  and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        listed = "\n  ".join(wrong[:_LISTED])
        raise InputError(
            f"merge: the models do not fit together (same architecture, vocabulary and types are needed; convert with "
            f"`prism-nemo export --dtype`):\n  {listed}{more}"
        )
    return sorted(held[0])


def _check_tokenizers(paths: Sequence[Path]) -> list[str]:
    """Refuse parents whose token ids mean different things; notes on what cannot be told, or differs in names only."""
    notes: list[str] = []
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in paths:
        file = _tokenizer_folder(path) / "tokenizer.json"
        if not file.is_file():
            notes.append(f"{path} has no tokenizer.json; its vocabulary was not compared")
            continue
        try:
            found.append((path, json.loads(file.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise InputError(f"{file}: not valid JSON: {error}") from error
    for path, content in found[1:]:
        first, own = found[0][1], content
        if first.get("model", {}).get("vocab") != own.get("model", {}).get("vocab"):
            raise InputError(
                f"merge: {path} has another vocabulary than {found[0][0]} (tokenizer.json): the rows of their "
                "embeddings stand for different tokens"
            )
        if first.get("added_tokens") != own.get("added_tokens"):
            notes.append(f"{path} and {found[0][0]} name added tokens differently; those of the carried one are used")
    return notes


def _tokenizer_folder(path: Path) -> Path:
    return path / CARRIED if kind_of(path) == NATIVE else path


def _write(
    settings: MergeSettings,
    recipe: Recipe,
    parents: Sequence[Weights],
    names: Sequence[str],
    architecture: Architecture,
    carried: Path,
    final: Path,
    record: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> None:
    done = 0
    planned: list[Planned] = []

    def blocks(name: str) -> Iterator[torch.Tensor]:
        nonlocal done
        for block in _blocks(recipe, parents, name):
            if not bool(torch.isfinite(block).all()):
                raise PrismError(
                    f"{final}: the merge of tensor {name} is NaN or infinite: a parent holds such a weight, or "
                    f"{block.dtype} cannot hold the result"
                )
            yield block
            done += block.numel() * block.element_size()
            if progress is not None:
                progress(done, total)

    for name in names:
        shape, dtype = tuple(parents[0].shape(name)), DTYPES[parents[0].dtype(name)]
        planned.append(Planned(name, dtype, shape, functools.partial(blocks, name)))
    total = sum(tensor.bytes for tensor in planned)
    sizes: dict[torch.dtype, int] = {}
    for tensor in planned:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    files = plan_files(planned, settings.max_shard_bytes)
    temporary = begin(final, total)
    try:
        with clean_failure(final):
            for file, tensors in files.items():
                write_file(temporary / file, tensors)
            (temporary / "config.json").write_text(json.dumps(hf_config(architecture, sizes), indent=2) + "\n")
            carry(_tokenizer_folder(carried), temporary)
            write_index(temporary, files)
            (temporary / LINEAGE).write_text(json.dumps(record, indent=2) + "\n")
            publish_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _blocks(recipe: Recipe, parents: Sequence[Weights], name: str) -> Iterator[torch.Tensor]:
    """A merged tensor, some rows at a time; methods that look at whole tensors hold those of all parents."""
    shape, dtype = parents[0].shape(name), DTYPES[parents[0].dtype(name)]
    whole = [load(parent, name) for parent in parents] if recipe.whole_tensors else []
    work = place_by_place(recipe, whole)
    for first, rows in blocks_of(tuple(shape), dtype):
        if whole:
            yield work([tensor[first : first + rows] for tensor in whole])
            continue
        parts = []
        for parent in parents:
            part = torch.empty((rows, *shape[1:]), dtype=dtype)
            parent.read(name, first, part)
            parts.append(part)
        yield work(parts)
