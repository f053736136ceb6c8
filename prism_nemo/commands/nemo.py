"""NeMo 2.x checkpoint folders: what `prism-nemo import` does with one, and `export --format nemo`."""

from __future__ import annotations

from pathlib import Path

import typer

from prism_nemo.commands.printing import is_main, say


def import_nemo(nemo_dir: Path, out: Path, vocab_size: int | None = None, strict: bool = False) -> None:
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


def export_nemo(checkpoint: Path, out: Path, tokenizer: Path | None = None) -> None:
    """Native checkpoint to NeMo 2 checkpoint folder (weights only)."""
    from prism_nemo.checkpoint.nemo import writing

    notes = writing.export_nemo(checkpoint, out, tokenizer)
    if is_main():
        for note in notes:
            say(f"prism-nemo: {note}")
        typer.echo(f"{out}: exported from {checkpoint} for NeMo 2")
