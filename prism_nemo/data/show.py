"""What a build holds and what a run would draw from it: as a tree for people, as values for programs.

The realised share is not an estimate: the samples of the run are dealt out as in training and counted. It differs from
the plan because samples are whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from prism_nemo.data.indexed import read_index
from prism_nemo.data.manifest import Manifest, SourceShare, describe
from prism_nemo.data.plan import DataPlan, make_plan
from prism_nemo.data.removed import summary
from prism_nemo.errors import InputError

# Narrower than this the tree does not fit; a pipe counts as 80 columns.
MIN_WIDTH = 130

_COLUMNS = ("documents", "tokens", "median", "longest", "planned", "realised", "epochs")


def show(manifest: Manifest, tokens: float, seq_length: int, packing: str = "best_fit") -> dict[str, Any]:
    """Returns the build and the run as plain values.

    Args:
        manifest: From `load_manifest`.
        tokens: What the run would train on; 0 takes one pass over everything that is not held out.
        seq_length: Tokens per sample, which sets how finely shares can be met.
        packing: How documents are cut into samples.

    Returns:
        `mixture`, `tokens`, `seq_length`, `packing`, `samples`, `refused` (None, or the arithmetic), `domains` and
        `sources`. Each source has its counts (`loss_tokens`: those trained on), `median_document` and
        `longest_document` in tokens, `planned_share`, `realised_share`, `train_tokens` and `epochs` (realised),
        `max_epochs`, `held_out`, and `report`.

    Raises:
        InputError: A number out of range, or a damaged build.
    """
    if tokens < 0 or not math.isfinite(tokens) or seq_length < 1:
        raise InputError(f"--tokens {tokens:g} must be 0 or more and --seq-length {seq_length} at least 1.")
    tokens = tokens or sum(source.tokens for source in manifest.sources if source.weight > 0)
    samples = math.ceil(tokens / seq_length)
    plan = describe(manifest, tokens)
    realised = realised_tokens(make_plan(manifest, seq_length=seq_length, seed=0, packing=packing), samples)
    sources = []
    for row, source in zip(plan, manifest.sources, strict=True):
        train_tokens = realised.get(row.name, 0.0)
        _, lengths, _, _ = read_index(manifest.prefix(row.name) + ".idx")
        sources.append(
            {
                "name": row.name,
                "domain": row.domain,
                "held_out": row.share == 0,
                "documents": source.documents,
                "tokens": source.tokens,
                "loss_tokens": source.tokens if source.loss_tokens is None else source.loss_tokens,
                "median_document": float(np.median(lengths)),
                "longest_document": int(lengths.max()),
                "planned_share": row.share,
                "realised_share": train_tokens / sum(realised.values()),
                "train_tokens": train_tokens,
                "epochs": train_tokens / source.tokens,
                "max_epochs": row.max_epochs,
                "report": source.report,
            }
        )
    return {
        "mixture": manifest.mixture,
        "tokens": tokens,
        "seq_length": seq_length,
        "packing": packing,
        "samples": samples,
        "refused": limits_broken(plan, tokens),
        "domains": _domains(sources),
        "sources": sources,
    }


def realised_tokens(plan: DataPlan, samples: int) -> dict[str, float]:
    """Returns how many tokens of text the first samples of a plan hold of each of its sources, padding left out."""
    counts = plan.counts(samples)
    return {drawn.name: counts[drawn.prefix] * plan.seq_length * drawn.fill for drawn in plan.sources}


def limits_broken(plan: Sequence[SourceShare], tokens: float) -> str | None:
    """Returns the arithmetic of every source that a run would repeat above its limit, or None."""
    lines = [
        f"{row.name}: {row.share:.2%} of {tokens:,.0f} tokens is {row.train_tokens:,.0f}; it has "
        f"{row.available_tokens:,}, so {row.epochs:.2f} epochs, and max_epochs is {row.max_epochs:g}; at this share "
        f"the run may have at most {row.max_epochs * row.available_tokens / row.share:,.0f} tokens"
        for row in plan
        if row.over_limit and row.max_epochs is not None
    ]
    return "; ".join(lines) or None


def tree(view: dict[str, Any]) -> RenderableType:
    """Returns `show`'s values as a tree of domains and sources."""
    title = (
        f"{view['mixture']}: {sum(s['tokens'] for s in view['sources']):,} tokens built; "
        f"a run of {view['tokens']:,.0f} tokens is {view['samples']:,} samples of {view['seq_length']:,}"
    )
    width = max(len(s["name"]) for s in (*view["sources"], *view["domains"])) + 2
    root = Tree(Text(title, "bold"))
    root.add(_row(width + 4, "", dict(zip(_COLUMNS, _COLUMNS, strict=True)), "dim"))
    for domain in view["domains"]:
        branch = root.add(_row(width + 4, domain["name"], _cells(domain), "bold"))
        for source in view["sources"]:
            if source["domain"] == domain["name"]:
                over = source["max_epochs"] is not None and source["epochs"] > source["max_epochs"]
                leaf = branch.add(_row(width, source["name"], _cells(source), "red" if over else ""))
                if source["loss_tokens"] != source["tokens"]:
                    leaf.add(
                        Text(f"{source['loss_tokens'] / source['tokens']:.1%} of its tokens are trained on", "dim")
                    )
                if source["report"]:
                    leaf.add(Text(summary(source["report"]), "dim"))
    return root


def _domains(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for source in sources:
        entry = found.setdefault(source["domain"], {"name": source["domain"], "sources": 0})
        entry["sources"] += 1
        for name in ("documents", "tokens", "planned_share", "realised_share", "train_tokens"):
            entry[name] = entry.get(name, 0) + source[name]
    return list(found.values())


def _cells(item: dict[str, Any]) -> dict[str, str]:
    cells = {"documents": f"{item['documents']:,}", "tokens": f"{item['tokens']:,}"}
    if "longest_document" in item:
        cells |= {"median": f"{item['median_document']:,.0f}", "longest": f"{item['longest_document']:,}"}
    if item.get("held_out"):
        return {**cells, "planned": "held out"}
    cells |= {"planned": f"{item['planned_share']:.2%}", "realised": f"{item['realised_share']:.2%}"}
    if "epochs" in item:
        limit = "" if item["max_epochs"] is None else f" of {item['max_epochs']:g}"
        cells["epochs"] = f"{item['epochs']:.2f}{limit}"
    return cells


def _row(width: int, name: str, cells: dict[str, str], style: str) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.add_column(width=width, no_wrap=True)
    for column in _COLUMNS:
        row.add_column(width=16 if column == "tokens" else 10, justify="right", no_wrap=True)
    row.add_row(name, *(cells.get(column, "") for column in _COLUMNS), style=style)
    return row
