"""`prism-nemo report`: the page that people look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a quickstart run.")],
) -> None:
    """Write the page that people look at."""
    from prism_nemo.report.page import write_report

    typer.echo(str(write_report(run)))
