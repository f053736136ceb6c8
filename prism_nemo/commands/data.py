"""`prism-nemo data`: build and look at token data."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from prism_nemo.commands.printing import Json, print_result, say, show_rich
from prism_nemo.errors import InputError

data_app = typer.Typer(no_args_is_help=True, help="Build and look at token data.")


@data_app.command("build")
def data_build(
    mixture: Annotated[Path, typer.Argument(help="Mixture YAML.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json or a Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 takes as many as there are cores.")] = 0,
    shard: Annotated[
        str | None, typer.Option(help="i/n, i from 0: one task of a Slurm array; run once without it to join.")
    ] = None,
    keep_parts: Annotated[
        bool, typer.Option("--keep-parts", help="Keep what a later build needs to redo only changed stretches.")
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face folder: refuse a tokenizer with more tokens than the model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read, filter, deduplicate, decontaminate and tokenise a mixture into Megatron's indexed datasets."""
    from prism_nemo.data.build import build_mixture, build_shard
    from prism_nemo.data.mixture_file import load_mixture
    from prism_nemo.data.progress import show_progress
    from prism_nemo.data.tokenizer import check_vocabulary, load_tokenizer

    part = _shard(shard)
    plan, encoder = load_mixture(mixture), load_tokenizer(tokenizer)
    if model is not None:
        check_vocabulary(encoder, model)
    workers = workers or len(os.sched_getaffinity(0))
    with show_progress(say) as (tell, watch):
        if part is not None:
            units = build_shard(plan, encoder, out, part, progress=tell, workers=workers, watch=watch)
            print_result({"shard": shard, "units": units}, as_json, f"{out}: {units} units")
            return
        manifest = build_mixture(plan, encoder, out, progress=tell, workers=workers, keep_parts=keep_parts, watch=watch)
    tokens = sum(source.tokens for source in manifest.sources)
    text = f"{out}: {len(manifest.sources)} sources, {tokens:,} tokens; look at it with: prism-nemo data show {out}"
    print_result({**json.loads(manifest.to_json()), "rebuilt": manifest.rebuilt}, as_json, text)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None:
        raise InputError(f"--shard '{text}': expected i/n, such as 0/8")
    return int(match[1]), int(match[2])


@data_app.command("show")
def data_show(
    folder: Annotated[Path, typer.Argument(help="Folder written by `data build`.")],
    tokens: Annotated[float, typer.Option(help="Tokens that a run would train on; default one pass of all.")] = 0,
    seq_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 8192,
    packing: Annotated[str, typer.Option(help="best_fit or concatenate.")] = "best_fit",
    as_json: Json = False,
) -> None:
    """Documents, tokens, planned and realised shares and epochs; refuses a run that repeats a source too often."""
    from prism_nemo.data.build import load_manifest
    from prism_nemo.data.show import MIN_WIDTH, show, tree

    view = show(load_manifest(folder), tokens, seq_length, packing)
    if as_json:
        typer.echo(json.dumps(view))
    else:
        show_rich(tree(view), MIN_WIDTH)
    if view["refused"] is not None:
        raise InputError(f"{folder}: the run would repeat sources too often: {view['refused']}")
