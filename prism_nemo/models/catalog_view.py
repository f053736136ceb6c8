"""The catalog as people and programs read it: tables for a terminal, plain values for JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prism_nemo.models.catalog import SURENESS, Model, compare_with_catalog
from prism_nemo.models.family import Architecture

# Narrower than this the tables do not fit; a pipe counts as 80 columns.
MIN_WIDTH = 100


def overview(models: Iterable[Model]) -> RenderableType:
    """One row a model, made to fit `MIN_WIDTH` columns, and what is not sure of each below."""
    models = list(models)
    table = Table(box=None, padding=(0, 2, 1, 0), header_style="bold")
    table.add_column("model\nHub id", no_wrap=True)
    table.add_column("family\nlayers")
    table.add_column("\nsize", justify="right", no_wrap=True)
    table.add_column("hidden\ncontext", justify="right", no_wrap=True)
    table.add_column("tensor-\nparallel", no_wrap=True)
    table.add_column("pipeline-\nparallel")
    for m in models:
        table.add_row(
            Text.assemble((m.name, "bold cyan"), "\n", (m.hub_id, "dim")),
            f"{m.architecture.family}\n{m.layers}",
            f"{m.parameters / 1e9:.2f}B",
            f"{m.architecture.hidden_size:,}\n{m.context_length:,}",
            _words(m.architecture.tensor_parallel_sizes()),
            _words(m.pipeline_parallel_sizes),
        )
    unsure = Table.grid(padding=(0, 2))
    unsure.add_column(no_wrap=True)
    unsure.add_column()
    for m in models:
        keys = [f"{key} ({sureness})" for key, sureness in m.unsure_fields.values()]
        unsure.add_row(Text(m.name, "cyan"), ", ".join(keys) or Text("all values sure", "dim"))
    return Group(
        table,
        Text("\nNot sure, therefore taken from the checkpoint at import:", "bold"),
        Padding(unsure, (0, 0, 0, 2)),
        Text("\nEvery value, with its source: prism-nemo models NAME", "dim"),
    )


def detail(model: Model) -> RenderableType:
    """Everything about one model."""
    a = model.architecture
    equal = "equal" if model.stated_parameters == model.parameters_as_stated else "DIFFERENT"
    if model.stated_with:
        equal += " with " + ", ".join(f"{key} {value}" for key, value in model.stated_with.items())
    facts: dict[str, str] = {
        "family": a.family,
        "parameters": f"{model.parameters:,}",
        "stated": f"{model.stated_parameters:,} ({equal}): {model.stated_by}",
        "layers": model.layers + (f"; {a.num_layers} of Megatron's layers" if a.layer_pattern else ""),
        "attention": f"{a.num_attention_heads} heads of {a.kv_channels}, {a.num_query_groups} key/value heads, "
        + (f"window {a.sliding_window}" if a.sliding_window else "no window"),
        "positions": _positions(model),
        "sizes": f"hidden {a.hidden_size:,}, MLP {a.ffn_hidden_size:,} ({a.activation}), vocabulary {a.vocab_size:,} "
        + ("(tied)" if a.tied_embeddings else "(untied)"),
        "context": f"{model.context_length:,} tokens",
    }
    if a.mamba is not None:
        facts["Mamba"] = (
            f"{a.mamba.heads} heads of {a.mamba.head_dim}, state {a.mamba.state_size}, groups {a.mamba.groups}, "
            f"step size within [{a.mamba.dt_limit[0]:g}, {a.mamba.dt_limit[1]:g}]"
        )
    facts["tensor-parallel"] = _words(a.tensor_parallel_sizes())
    facts["pipeline-parallel"] = _words(model.pipeline_parallel_sizes)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, value in facts.items():
        grid.add_row(name, value)

    values = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    values.add_column("config.json", no_wrap=True)
    values.add_column("value", overflow="fold")
    values.add_column("sure", no_wrap=True)
    values.add_column("why not sure")
    for key in [*model.config, *(key for key in model.unsure if key not in model.config)]:
        shown: str | Text = _short(model.config[key]) if key in model.config else Text("no key", "dim")
        why = model.unsure.get(key)
        if why is None:
            values.add_row(key, shown, "A", "")
        else:
            values.add_row(Text(key, "yellow"), shown, Text(why.sureness, "yellow"), why.source)
    parts: list[RenderableType] = [
        Text.assemble((model.name, "bold cyan"), "  ", model.hub_id, "\n"),
        grid,
        Text(""),
        values,
        Text("\nWhat is not A is taken from the checkpoint at import, or refused where the family has no such thing."),
        *(Text(f"  {letter:<3}{meaning}", "dim") for letter, meaning in SURENESS.items()),
        Text("\nSources", "bold"),
        *(Text(f"  {source}") for source in model.sources),
    ]
    return Group(*parts)


def catalog_notes(architecture: Architecture) -> list[str]:
    """How an imported architecture differs from the catalog's entry of its sizes; nothing if there is no entry."""
    found = compare_with_catalog(architecture)
    if found is None:
        return []
    name = found.model.name
    wrong = [
        f"warning: not {name} as the catalog knows it, although its sizes are: {line}" for line in found.contradictions
    ]
    return wrong + [f"{name}: {line}" for line in found.taken]


def to_dict(model: Model) -> dict[str, Any]:
    """Everything about one model, in values that JSON has."""
    a = model.architecture
    return {
        "name": model.name,
        "hub_id": model.hub_id,
        "family": a.family,
        "parameters": model.parameters,
        "stated_parameters": model.stated_parameters,
        "stated_by": model.stated_by,
        "stated_with": model.stated_with,
        "layers": model.layers,
        "megatron_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "vocab_size": a.vocab_size,
        "context_length": model.context_length,
        "tensor_parallel_sizes": a.tensor_parallel_sizes(),
        "pipeline_parallel_sizes": model.pipeline_parallel_sizes,
        "config": model.config,
        "unsure": {
            key: {"in_config": key in model.config, "sureness": why.sureness, "source": why.source}
            for key, why in model.unsure.items()
        },
        "taken_from_checkpoint": [key for key, _ in model.unsure_fields.values()],
        "sources": list(model.sources),
    }


def _words(sizes: Iterable[int]) -> str:
    return " ".join(map(str, sizes))


def _positions(model: Model) -> str:
    rope = model.architecture.rope
    if rope is None:
        return "none"
    scaling = rope.scaling and f", {rope.scaling['rope_type']} scaling by {rope.scaling['factor']:g}"
    return f"rotary, base {rope.theta:,.0f}{scaling or ''}"


def _short(value: Any) -> str:
    """A value of a configuration; a list of layer kinds as counts, with the places of the rare ones."""
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_short(inner)}" for key, inner in value.items())
    if not isinstance(value, list) or len(value) < 2:
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, str) else json.dumps(value)
    words = []
    for kind, count in Counter(value).most_common():
        places = [i for i, item in enumerate(value) if item == kind]
        words.append(f"{count} {kind}" + (f" (at {', '.join(map(str, places))})" if count <= 8 else ""))
    return ", ".join(words)
