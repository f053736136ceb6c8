"""`prism-nemo models`, `plan` and `doctor`: what fits, and what this machine offers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prism_nemo.commands.printing import Json, show_rich
from prism_nemo.errors import InputError


def models(
    name: Annotated[str | None, typer.Argument(help="Short name or Hub id; all if none is given.")] = None,
    as_json: Json = False,
) -> None:
    """The models that this project is made for: sizes, layouts that fit, and what is not sure about them."""
    from prism_nemo.models.catalog import CATALOG, find
    from prism_nemo.models.catalog_view import MIN_WIDTH, detail, overview, to_dict

    model = find(name) if name is not None else None
    if as_json:
        typer.echo(json.dumps([to_dict(m) for m in CATALOG.values()] if model is None else to_dict(model)))
    else:
        show_rich(overview(CATALOG.values()) if model is None else detail(model), MIN_WIDTH)


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.py) or a resolved config.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, by dotted name.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the catalog or Hugging Face folder, in place of a checkpoint.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Default as many as the recipe's layout has.")] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    assume: Annotated[list[str] | None, typer.Option(help="key=value of an assumption; may be repeated.")] = None,
    rehearsal: Annotated[
        bool, typer.Option("--rehearse", help="Build every rank at full size without memory, and count.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Memory, time and layouts of a run before any GPU hour is spent; refuses what does not fit."""
    from prism_nemo.planning.plan import make_plan, to_dict
    from prism_nemo.planning.show import MIN_WIDTH, plan_view

    found = make_plan(recipe, overrides or [], model, gpus, gpu, assume, rehearsal)
    if as_json:
        typer.echo(json.dumps(to_dict(found)))
    else:
        show_rich(plan_view(found), MIN_WIDTH)
    if found.refusal is not None:
        raise InputError(found.refusal)


def doctor(as_json: Json = False) -> None:
    """What this machine offers, which kernel each part will use, and what is missing."""
    from prism_nemo.runtime.doctor import diagnose
    from prism_nemo.runtime.doctor_view import MIN_WIDTH, doctor_view

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        show_rich(doctor_view(found), MIN_WIDTH)
