"""`prism-nemo report`: the page that people look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[
        list[Path],
        typer.Argument(help="Run directories, results of eval, retention and analyze, or folders that hold such."),
    ],
    out: Annotated[Path | None, typer.Option(help="File to write; default report.html in the first directory.")] = None,
) -> None:
    """Write the page that people look at: one HTML file that needs no network."""
    from prism_nemo.report.page import write_report

    typer.echo(str(write_report(run, out)))
