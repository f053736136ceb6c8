"""NeMo 2.x checkpoint folders: what `prism-nemo import` does with one, and `export --format nemo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_nemo.commands.printing import is_main, say


def import_nemo(
    nemo_dir: Annotated[Path, typer.Argument(help="NeMo 2 checkpoint: a folder with weights/ and context/.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Entries of the vocabulary, where the folder does not say.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse weights that are NaN or infinite.")] = False,
) -> None:
    """NeMo 2 checkpoint to native checkpoint (weights only, loads at any layout), types kept."""
    from prism_nemo.checkpoint.nemo import reading

    found = reading.import_nemo(nemo_dir, out, vocab_size, strict)
    if not is_main():
        return
    for name in found.not_finite:
        say(f"prism-nemo: warning: tensor '{name}' holds NaN or infinity")
    for note in found.notes:
        say(f"prism-nemo: {note}")
    typer.echo(f"{out}: imported from {nemo_dir} ({found.family})")


def export_nemo(
    checkpoint: Annotated[Path, typer.Argument(help="Native checkpoint.")],
    out: Annotated[Path, typer.Option(help="NeMo 2 checkpoint folder to write.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder whose tokenizer files are copied; default those that came with the import."),
    ] = None,
) -> None:
    """Native checkpoint to NeMo 2 checkpoint folder (weights only)."""
    from prism_nemo.checkpoint.nemo import writing

    notes = writing.export_nemo(checkpoint, out, tokenizer)
    if is_main():
        for note in notes:
            say(f"prism-nemo: {note}")
        typer.echo(f"{out}: exported from {checkpoint} for NeMo 2")
