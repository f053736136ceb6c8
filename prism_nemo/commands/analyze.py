"""`prism-nemo analyze`: what a stage changed inside the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prism_nemo.commands.printing import Json, say, show_rich

analyze_app = typer.Typer(no_args_is_help=True, help="What a stage changed inside the model.")


@analyze_app.command("weights")
def analyze_weights(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Two or more, in the order of training: Hugging Face folders or native ones.")
    ],
    transition: Annotated[
        list[str] | None,
        typer.Option(help="FROM:TO, a further step between two checkpoints, such as base:base_rl; may be repeated."),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(help="Run directory of the stage between two checkpoints, one for each step in order, or -."),
    ] = None,
    spectrum: Annotated[bool, typer.Option("--spectrum", help="Singular values of the updates too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the tables (JSON, tidy JSONL and Parquet).")] = None,
    as_json: Json = False,
) -> None:
    """How much the weights changed, in size, direction and place, beside what null models would give."""
    from prism_nemo.analysis.weights_report import WeightsSettings, analyze_weights, transition_of
    from prism_nemo.analysis.weights_view import MIN_WIDTH, weights_view
    from prism_nemo.training.progress import Progress

    moves = [transition_of(text) for text in transition or []]
    settings = WeightsSettings(checkpoints, moves, run or [], spectrum)
    progress: list[Progress] = []

    def watch(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress("weights", total, 0, True))
        if done < total:
            progress[0].update(done, "")

    report = analyze_weights(settings, watch)
    if out is not None:
        for path in report.write(out):
            say(f"prism-nemo: wrote {path}")
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        show_rich(weights_view(report), MIN_WIDTH)
