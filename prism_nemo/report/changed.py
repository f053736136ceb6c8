"""The part about what changed inside: weights beside their null models, similarity by layer, and the path between."""

from __future__ import annotations

from typing import Any

from prism_nemo.report import charts
from prism_nemo.report.formatting import decimal, percent, significant
from prism_nemo.report.line_charts import Series, line_chart
from prism_nemo.report.read import mapping, number, objects, sequence, share, words
from prism_nemo.report.story import Story
from prism_nemo.report.svg import Style
from prism_nemo.report.view import Figure, Table

_OBSERVED = Style("s-prism-rl", "star")
_NULLS = {
    "decay": ("weight decay alone", Style("s-base")),
    "random_walk": ("random walk", Style("s-midtrained")),
    "drift": ("drift", Style("s-longer")),
}
_MEASURES = (
    (
        "relative_l2",
        "Distance travelled",
        "Length of the change divided by the length of the weights before it (relative L2).",
    ),
    (
        "changed_fraction_1pct",
        "Weights that moved by more than 1%",
        "Share of single weights whose value changed by more than 1% of itself.",
    ),
)
# Measures of CKA that are shown, the better one first; of another one a pair gets no strip.
_CKA = {"debiased": "Debiased linear CKA", "linear": "Linear CKA"}
_MOST = 12


def weight_figures(story: Story) -> list[Figure]:
    """Draws for each transition the share of weights that moved by component, beside its null models, and by layer."""
    found = [
        (_ends(story, transition), transition)
        for result in story.found.of("weights")
        for transition in objects(result.content.get("transitions"))[:_MOST]
    ]
    if not found:
        story.missing("How far the weights moved", "prism-nemo analyze weights BASE MID_TRAINED RL --out FOLDER")
        return []
    figures = [_components(name, transition) for name, transition in found]
    for part, of, label in (("by_subcomponent", "by component", ""), ("by_layer", "by layer", "layer ")):
        for measure in _MEASURES:
            figures += _measured(found, part, of, label, *measure)
    return figures


def _measured(
    found: list[tuple[str, dict[str, Any]]], part: str, of: str, label: str, key: str, title: str, caption: str
) -> list[Figure]:
    """One measure of all transitions as strips; by component the share is in the figures of the transitions already."""
    if part == "by_subcomponent" and key == "changed_fraction_1pct":
        return []
    columns = list(dict.fromkeys(name for _, transition in found for name in mapping(transition.get(part))))
    rows = []
    for name, transition in found:
        inside = mapping(transition.get(part))
        rows.append((name, [number(mapping(inside.get(column)).get(key)) for column in columns]))
    if not any(value is not None for _, values in rows for value in values):
        return []
    shown = percent if key == "changed_fraction_1pct" else significant
    names = [f"{label}{column}" for column in columns]
    title = f"{title}, {of}"
    svg = charts.heat_strip(rows, names, title=title, value_format=shown, centre=0.0, least_reach=1e-12, width=1000)
    table = Table(("stage", *names), [(name, *map(shown, values)) for name, values in rows], title)
    return [Figure(title, svg, caption, table, wide=True)]


def _components(name: str, transition: dict[str, Any]) -> Figure:
    bars, rows = [], []
    nulls = mapping(transition.get("nulls"))
    drawn = any(null.get("name") != "fitted" for found in nulls.values() for null in objects(found))
    parts = {"all weights": transition, **mapping(transition.get("by_subcomponent"))}
    for part, change in parts.items():
        value = share(mapping(change).get("changed_fraction_1pct"))
        # With nothing to stand beside it, a bar needs no heading of its own.
        named = ("observed", part) if drawn else (part, "")
        bars.append(charts.Bar(named[0], _OBSERVED, value, percent(value), named[1]))
        rows.append((f"{part}: observed", percent(value), significant(number(mapping(change).get("relative_l2")))))
        for null in objects(nulls.get("total" if part == "all weights" else part)):
            if null.get("name") == "fitted":
                continue  # it has the observed share by construction
            label, style = _NULLS.get(words(null.get("name")), (words(null.get("name")), Style("s-other")))
            expected = share(mapping(null.get("thresholds")).get("1"))
            bars.append(charts.Bar(label, style, expected, percent(expected), part))
            rows.append((f"{part}: {label}", percent(expected), significant(number(null.get("relative_l2")))))
    title = f"{name}: weights that moved by more than 1%"
    svg = charts.horizontal_bars(
        bars, title=title, tick_format=lambda value: percent(value, 0), x_range=(0.0, 1.0), labels=142
    )
    told = "The null models know nothing of the data, only the stage's learning rates and weight decay."
    caption = told if drawn else "No null model with the stage's schedule was asked for: any training may do this."
    return Figure(title, svg, caption, Table(("component", "moved by > 1%", "relative L2"), rows, title))


def cka_figures(story: Story) -> list[Figure]:
    """Draws how alike the models represent text: a strip by layer with its null, and layer against layer."""
    figures = []
    for result in story.found.of("cka"):
        rows = [
            row
            for row in objects(result.content.get("rows"))
            if (row.get("pooling"), row.get("treatment")) == ("mean", "raw") and words(row.get("measure")) in _CKA
        ]
        measures = [measure for measure in _CKA if any(row.get("measure") == measure for row in rows)]
        rows = [row for row in rows if row.get("measure") == measures[0]]
        for name in dict.fromkeys(words(row.get("input")) for row in rows):
            figures.append(_strips(name, _CKA[measures[0]], [row for row in rows if words(row.get("input")) == name]))
        for one in objects(result.content.get("maps"))[: 6 * _MOST]:
            values = [[number(value) for value in sequence(row)] for row in sequence(one.get("values"))]
            if one.get("measure") == "debiased" and values:
                figures.append(_map(words(one.get("pair")), words(one.get("input")), values))
    if not figures:
        story.missing(
            "How alike the models represent text (CKA)", "prism-nemo analyze cka BASE MODEL --data DATA --out FOLDER"
        )
    return figures


def _strips(name: str, measure: str, rows: list[dict[str, Any]]) -> Figure:
    strips: list[tuple[str, list[float | None]]] = []
    numbers = []
    for pair in dict.fromkeys(words(row.get("pair")) for row in rows):
        mine = sorted(
            (row for row in rows if words(row.get("pair")) == pair), key=lambda row: number(row.get("layer")) or 0
        )
        for label, key in ((pair, "value"), ("random update", "null")):
            values = [number(row.get(key)) for row in mine]
            if any(value is not None for value in values):
                strips.append((label, values))
                numbers.append((pair if key == "value" else f"{pair}: random update", values))
    length = max((len(values) for _, values in strips), default=0)
    columns = _layers(length)
    title = f"Similarity of representations (CKA) on {name}"
    svg = charts.heat_strip(strips, columns, title=title, value_format=decimal, centre=1.0, least_reach=0.1)
    caption = f"{measure} of states averaged over each text, after the embedding and after each layer; 1 is alike."
    if any(number(row.get("null")) is not None for row in rows):
        caption += (
            " Below each pair: what random updates of the same size leave. Where both are alike, the size of the "
            "update explains it."
        )
    cells = []
    for label, values in numbers:
        lowest = min((value for value in values if value is not None), default=None)
        padded = [*values, *[None] * (length - len(values))]
        cells.append((label, *(decimal(value, 4) for value in padded), decimal(lowest, 4)))
    table = Table(("comparison", *columns, "lowest"), cells, title)
    return Figure(title, svg, caption, table, wide=True)


def _map(pair: str, name: str, values: list[list[float | None]]) -> Figure:
    places, columns = _layers(len(values)), _layers(max(len(row) for row in values))
    title = f"Layer against layer: {pair}"
    svg = charts.heat_strip(
        list(zip(places, values, strict=True)),
        columns,
        title=f"{title}, on {name}",
        value_format=lambda value: decimal(value, 2),
        centre=0.0,
        least_reach=1.0,
        width=520,
    )
    table = Table(("layer", *columns), [(a, *map(decimal, row)) for a, row in zip(places, values, strict=True)], title)
    return Figure(
        title, svg, f"CKA of every layer of the first (rows) with every layer of the second, on {name}.", table
    )


def path_figures(story: Story) -> list[Figure]:
    """Draws loss and pass rate along the straight line between the models."""
    figures = []
    for result in story.found.of("path"):
        names = [story.name_of(words(model)) for model in sequence(result.content.get("models"))]
        rows = [row for row in objects(result.content.get("rows")) if _along(row) is not None]
        for measure in dict.fromkeys(words(row.get("measure")) for row in rows):
            figures.append(_path(measure, names, [row for row in rows if row.get("measure") == measure]))
    if not figures:
        story.missing(
            "The path between the models", "prism-nemo analyze path BASE MID_TRAINED RL --data DATA --out FOLDER"
        )
    return figures


def _path(measure: str, names: list[str], rows: list[dict[str, Any]]) -> Figure:
    shown = percent if measure == "pass_rate" else decimal
    styles = (Style("s-midtrained", "square"), Style("s-base-rl", "triangle", "2 3"), Style("s-prism-rl", "star"))
    series, numbers = [], []
    for place, name in enumerate(dict.fromkeys(words(row.get("name")) for row in rows)):
        mine = sorted((row for row in rows if words(row.get("name")) == name), key=lambda row: _along(row) or 0.0)
        at = [_along(row) or 0.0 for row in mine]
        values = [_or_gap(row, "value") for row in mine]
        low, high = [_or_gap(row, "low") for row in mine], [_or_gap(row, "high") for row in mine]
        whole = all(one == one for one in (*low, *high))
        style = styles[place % len(styles)]
        series.append(
            Series(name, style, at, values, low=low if whole else (), high=high if whole else ())
        )  # fmt: skip
        numbers += [
            (f"{name} at {x:.3g}", shown(y), f"{shown(a)} to {shown(b)}")
            for x, y, a, b in zip(at, values, low, high, strict=True)
        ]
    title = {"loss": "Loss along the path", "pass_rate": "Pass rate along the path"}.get(measure, measure)
    svg = line_chart(
        series, title=title, x_label="0: first model, 1: second, 2: third", y_label=measure.replace("_", " "),
        y_format=shown, y_range=(0.0, 1.0) if measure == "pass_rate" else None,
    )  # fmt: skip
    ends = "; ".join(f"{place} is {name}" for place, name in enumerate(names))
    caption = f"Weights on the straight line between the models: {ends}. The band is the 95% interval."
    return Figure(title, svg, caption, Table(("place", "value", "95% interval"), numbers, title))


def _along(row: dict[str, Any]) -> float | None:
    """Where a point lies on the line A to B (0 to 1) to C (1 to 2); None for one of the square between."""
    alpha, beta = number(row.get("alpha")), number(row.get("beta"))
    if alpha is None or beta is None:
        return None
    return alpha if beta == 0 else 1 + beta if alpha == 1 else None


def _or_gap(row: dict[str, Any], key: str) -> float:
    found = number(row.get(key))
    return float("nan") if found is None else found


def _ends(story: Story, transition: dict[str, Any]) -> str:
    if "name" in transition:  # of a quickstart, whose stages are no paths
        return words(transition["name"])
    return " → ".join(story.name_of(words(transition.get(key))) for key in ("before", "after"))


def _layers(count: int) -> list[str]:
    return ["embedding", *(f"layer {place}" for place in range(1, count))][:count]
