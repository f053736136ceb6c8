"""`prism-nemo import`, `export` and `verify`: Hugging Face folders and native checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from prism_nemo.commands.card import ResultFolders
from prism_nemo.commands.printing import Json, Pp, Tp, is_main, print_result, say
from prism_nemo.errors import InputError, PrismError


def _layout(tp: int, pp: int) -> Any:
    from prism_nemo.config import ParallelConfig

    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)


def import_(
    hf_dir: Annotated[
        Path, typer.Argument(help="Hugging Face folder, a model of the hub such as org/name, or a NeMo 2 checkpoint.")
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    tp: Tp = 1,
    pp: Pp = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse weights that are NaN or infinite.")] = False,
    dt_floor: Annotated[
        float | None, typer.Option(help="nemotron_h only: smallest step size of the Mamba mixers; default none.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="NeMo only: entries of the vocabulary, where the folder does not say.")
    ] = None,
) -> None:
    """Hugging Face folder or NeMo 2 checkpoint to native checkpoint (loads at any layout), types kept."""
    from prism_nemo.checkpoint.nemo.folder import is_nemo_folder

    if is_nemo_folder(hf_dir):
        if dt_floor is not None:
            raise InputError("--dt-floor is for Hugging Face folders; NeMo's say it themselves")
        from prism_nemo.commands.nemo import import_nemo

        import_nemo(hf_dir, out, vocab_size, strict)
        return
    if vocab_size is not None:
        raise InputError(f"--vocab-size is for NeMo 2 checkpoints; {hf_dir} is none (no weights/ and context/)")
    from prism_nemo.checkpoint.convert import import_hf, refuse_existing
    from prism_nemo.checkpoint.hub import local_folder, source_name
    from prism_nemo.checkpoint.native import read_architecture
    from prism_nemo.models.catalog_view import catalog_notes

    refuse_existing(out)
    folder = local_folder(hf_dir)
    report = import_hf(folder, out, _layout(tp, pp), strict, dt_floor, source_name(hf_dir, folder))
    if not is_main():
        return
    for name in report.not_finite:
        say(f"prism-nemo: warning: tensor '{name}' holds NaN or infinity")
    if report.skipped:
        say(f"prism-nemo: {len(report.skipped)} buffers that are no weights were left out: {report.skipped[0]}, ...")
    for note in catalog_notes(read_architecture(out)):
        say(f"prism-nemo: {note}")
    typer.echo(f"{out}: imported from {hf_dir}; check it with: prism-nemo verify {hf_dir} {out}")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Native checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    form: Annotated[str, typer.Option("--format", help="hf, or nemo for a NeMo 2 checkpoint.")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default as stored.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder whose tokenizer files are copied; default those that came with the import."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of a file, such as 5GB or 500MB.")] = "5GB",
    push_to: Annotated[str | None, typer.Option(help="Upload to the hub as org/name (made private if new).")] = None,
    results: ResultFolders = None,
) -> None:
    """Native checkpoint to Hugging Face folder with a model card, or to a NeMo 2 checkpoint."""
    if form == "nemo":
        if dtype is not None or push_to is not None or results:
            raise InputError("--dtype, --push-to and --results are for --format hf")
        from prism_nemo.commands.nemo import export_nemo

        export_nemo(checkpoint, out, tokenizer)
        return
    if form != "hf":
        raise InputError(f"--format '{form}' is unknown; choose hf or nemo")
    import torch

    from prism_nemo.checkpoint.convert import export_hf
    from prism_nemo.checkpoint.hub import prepare_upload, upload
    from prism_nemo.checkpoint.model_card import write_model_card
    from prism_nemo.checkpoint.native import read_architecture

    for folder in results or ():
        if not folder.is_dir():
            raise InputError(f"--results {folder}: no such folder")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        raise InputError(f"--dtype '{dtype}' is unknown; choose one of {', '.join(dtypes)}")
    if tokenizer is not None and not tokenizer.is_dir():
        raise InputError(f"--tokenizer {tokenizer}: no such folder")
    limit = _size(max_shard_size)
    if push_to is not None and is_main():
        read_architecture(checkpoint)
        prepare_upload(push_to)
    export_hf(checkpoint, out, dtypes[dtype] if dtype else None, tokenizer, limit)
    if not is_main():
        return
    write_model_card(out, checkpoint, results or ())
    if push_to is not None:
        upload(out, push_to)
    typer.echo(f"{out}: exported from {checkpoint}; check it with: prism-nemo verify {out} {checkpoint}")


def _size(text: str) -> int:
    """Bytes of a size such as ``5GB`` (powers of ten, as the hub counts)."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise InputError(f"--max-shard-size '{text}': expected a size such as 5GB or 500MB")
    return size


def verify(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder, or a model of the hub such as org/name.")],
    checkpoint: Annotated[Path, typer.Argument(help="Native checkpoint.")],
    tp: Tp = 1,
    pp: Pp = 1,
    card: Annotated[Path | None, typer.Option(help="Verification card (YAML) to write or to add to.")] = None,
    as_json: Json = False,
) -> None:
    """Compare every weight bit for bit, then forward both models on the same tokens (fp32)."""
    from prism_nemo.checkpoint.card import read_card, write_card
    from prism_nemo.checkpoint.hub import local_folder
    from prism_nemo.checkpoint.native import read_architecture
    from prism_nemo.checkpoint.verification import verify as run_verify

    if card is not None:
        read_card(card)
    result = run_verify(local_folder(hf_dir), checkpoint, _layout(tp, pp))
    if is_main():
        if card is not None:
            # Names, not paths: a card is read on other machines.
            command = f"prism-nemo verify {hf_dir.name} {checkpoint.name} --tp {tp} --pp {pp} --card {card.name}"
            family = read_architecture(checkpoint).family
            write_card(card, card.stem, family, result, _layout(tp, pp), command)
        weights = f"{len(result.different_tensors)} of {result.tensors} tensors differ"
        if result.different_tensors:
            weights += f" ({', '.join(result.different_tensors[:3])})"
        if result.cast:
            weights += f" after {', '.join(result.cast)}"
        verdict = "equal within tolerance" if result.passed else "DIFFERENT"
        lines = [
            f"{weights}; logits differ by {result.rms_logit_diff:.1e} rms (tolerance {result.rms_tolerance:.1e}) and "
            f"{result.max_abs_logit_diff:.1e} at most (tolerance {result.tolerance:.1e}; logit std "
            f"{result.logit_std:.2f}, same top token {result.argmax_agreement:.1%} of {result.tokens}): "
            f"{verdict}",
            *(f"note: {note}" for note in result.notes),
        ]
        print_result(result.to_dict(), as_json, "\n".join(lines))
    if not result.passed:
        raise PrismError(f"{checkpoint} does not compute the same function as {hf_dir}")
