"""A whole study: its cells, then tables and verdicts; and its page from the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.study.claims import CLAIMS
from prism_nemo.study.folders import Folders
from prism_nemo.study.page import shown_effect, write_page
from prism_nemo.study.plan import plan
from prism_nemo.study.pool import Study
from prism_nemo.study.settings import FAMILIES, budget_named
from prism_nemo.study.tidy import LINEAGE, collect, read, write
from prism_nemo.study.verdicts import decide

SEEDS = 3


def run_study(
    out: Path,
    data: Path | None,
    families: Sequence[str],
    seeds: int,
    budget: str,
    processes: int,
    slice_minutes: float | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Do what is not done of a study, and write its tables.

    Returns:
        ``claims`` (claim, verdict, effects) and ``tables``, the folder.

    Raises:
        InputError: For settings that cannot be, or another study in `out`; before anything is done.
        StoppedEarly: At the end of a slice.
        PrismError: If a cell fails.
    """
    cells = plan(families, seeds)
    study = Study(out, budget_named(budget), cells, say, processes)
    study.run(slice_minutes)
    table = collect(study.folders, cells)
    folder = data or out / "data-tables"
    write(table, folder)
    claims = []
    for claim in CLAIMS:
        bounds = claim.bounds(table, None)
        effects = {bound.label: shown_effect(bound.effect) for bound in bounds}
        claims.append({"claim": claim.text, "verdict": decide(bounds), "effects": effects})
    return {"claims": claims, "tables": str(folder)}


def write_study_page(
    out: Path, data: Path | None, page: Path, families: Sequence[str] = FAMILIES, seeds: int = SEEDS
) -> list[Path]:
    """The page, from the tables in `data`; those are made from the study in `out` first, where it is there.

    Returns:
        The files written.

    Raises:
        InputError: If there is neither.
    """
    folder = data or out / "data-tables"
    files = []
    if (out / "cells").is_dir() or not (folder / LINEAGE).is_file():
        files = write(collect(Folders(out.resolve()), plan(families, seeds)), folder)
    return files + write_page(read(folder), page)
