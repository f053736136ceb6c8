"""`prism-nemo quickstart`: the whole pipeline at pocket size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_nemo.commands.printing import Json, print_result, say
from prism_nemo.errors import InputError


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    family: Annotated[str, typer.Option(help="Model family.")] = "llama",
    as_json: Json = False,
) -> None:
    """The whole pipeline at pocket size on this machine, ending in a report."""
    from prism_nemo.models.family import family_named
    from prism_nemo.quickstart.pipeline import Quickstart
    from prism_nemo.quickstart.settings import PocketSettings

    family_named(family)
    if family != "llama":
        raise InputError(f"--family '{family}': there is no pocket-size setting for it; choose llama")
    summary = Quickstart(out, PocketSettings(), say).run()
    lines = [f"{'holds' if c['holds'] else 'does NOT hold'}: {c['claim']} ({c['detail']})" for c in summary["expected"]]
    lines.append(f"{summary['seconds']:.0f} s, {summary['peak_rss_gb']:.1f} GB; open {out / 'report.html'}")
    print_result(summary, as_json, "\n".join(lines))
