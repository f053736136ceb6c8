"""`prism-nemo study`: the whole grid at pocket size, with controls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_nemo.commands.printing import Json, print_result, say


def study(
    out: Annotated[Path, typer.Option(help="Folder of the study; the same settings go on with one that stopped.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every family.")] = 3,
    families: Annotated[
        str, typer.Option(help="Families, with commas between them.")
    ] = "llama,granite,granite_hybrid,nemotron_h",
    budget: Annotated[str, typer.Option(help="full, half or tiny.")] = "full",
    processes: Annotated[int, typer.Option(min=1, help="Cells at a time, one core each.")] = 2,
    slice_minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Stop in time for this, with exit code 75; run it again to go on.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder for the tables; OUT/data-tables if not given. With --page: read there.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write this page from the tables, and train nothing.")] = None,
    as_json: Json = False,
) -> None:
    """The study's grid on this machine: cells, controls, null models, verdicts."""
    from prism_nemo.study.run import run_study, write_study_page

    wanted = [name.strip() for name in families.split(",") if name.strip()]
    if page is not None:
        files = write_study_page(out, data, page, wanted, seeds)
        print_result({"files": [str(file) for file in files]}, as_json, "\n".join(str(file) for file in files))
        return
    found = run_study(out, data, wanted, seeds, budget, processes, slice_minutes, say)
    lines = [f"{claim['verdict']}: {claim['claim']}" for claim in found["claims"]]
    print_result(found, as_json, "\n".join([*lines, f"tables: {found['tables']}"]))
