"""`prism-nemo card`: the model card of an exported model, written anew once there are results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OverwriteCard = Annotated[bool, typer.Option("--overwrite-card", help="Replace a README.md that somebody else wrote.")]
ResultFolders = Annotated[
    list[Path] | None,
    typer.Option(
        "--results", help="Folder of `eval` or `retention` (may be repeated); those beside the run are found anyway."
    ),
]


def card(
    checkpoint: Annotated[Path, typer.Argument(help="Native checkpoint that was exported.")],
    out: Annotated[Path, typer.Option(help="Its Hugging Face folder.")],
    results: ResultFolders = None,
    overwrite_card: OverwriteCard = False,
) -> None:
    """Write README.md of an exported model: lineage, mixture, settings, results, licence, limits."""
    from prism_nemo.checkpoint.model_card import write_model_card

    typer.echo(f"{write_model_card(out, checkpoint, results or (), overwrite_card)}: written")
