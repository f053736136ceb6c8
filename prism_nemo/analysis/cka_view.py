"""What `analyze cka` shows: the lowest values in a few lines, and strips and maps by layer as drawings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from prism_nemo.analysis.gram import MEASURES
from prism_nemo.analysis.massive import RAW
from prism_nemo.analysis.representations import CKAComparison
from prism_nemo.report import charts
from prism_nemo.report.formatting import decimal

_SHORT = {RAW: "observed", "without_massive": "without massive", "standardised": "standardised"}


def cka_lines(comparison: CKAComparison) -> list[str]:
    """For each pair, input, pooling and treatment the layer of the lowest value of each form of CKA.

    Behind it stand the interval and what random updates of the same size leave at that layer.
    """
    lines = []
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in comparison.rows:
        groups.setdefault((row["pair"], row["input"], row["pooling"], row["treatment"]), []).append(row)
    for (pair, *place), rows in groups.items():
        lines.append(f"{pair}, {', '.join(place)}")
        for measure in MEASURES:
            lowest = min((row for row in rows if row["measure"] == measure), key=lambda row: row["value"])
            lines.append(f"  {measure:<9} lowest {_value(lowest)} at layer {lowest['layer']}")
        for measure, pick in (("procrustes", max), ("mutual_neighbours", min)):
            row = pick((r for r in rows if r["measure"] == measure), key=lambda r: r["value"])
            lines.append(f"  {measure:<18} {_value(row)} at layer {row['layer']}")
    massive = sorted({(r["model"], r["dimension"]) for r in comparison.massive if r["massive"]})
    if massive:
        ratio = comparison.settings.get("massive_ratio")
        listed = ", ".join(f"{model}: {dimension}" for model, dimension in massive[:12])
        lines.append(f"dimensions above {ratio:g} times the median of their state: {listed}")
    return lines


def _value(row: dict[str, Any]) -> str:
    text = f"{row['value']:.5f}"
    if row["low"] is not None:
        text += f" [{row['low']:.5f}, {row['high']:.5f}]"
    if row["null"] is not None:
        text += f" (random update {row['null']:.5f})"
    return text


def cka_strips(
    comparison: CKAComparison, pair: str, input_name: str, measure: str = "debiased", pooling: str = "mean"
) -> Markup:
    """Values of a pair by layer on one input: a strip for each treatment, and one for its random updates below it."""
    strips: list[tuple[str, list[float | None]]] = []
    wanted = [
        row
        for row in comparison.rows
        if (row["pair"], row["input"], row["measure"], row["pooling"]) == (pair, input_name, measure, pooling)
    ]
    for treatment in dict.fromkeys(row["treatment"] for row in wanted):
        own = sorted((row for row in wanted if row["treatment"] == treatment), key=lambda row: row["layer"])
        strips.append((_SHORT[treatment], [row["value"] for row in own]))
        if any(row["null"] is not None for row in own):
            strips.append(("random update", [row["null"] for row in own]))
    length = max((len(values) for _, values in strips), default=0)
    return charts.heat_strip(
        strips,
        _places(range(length)),
        title=f"CKA ({measure}) of {pair} on {input_name}, by layer",
        value_format=decimal,
        centre=1.0,
        least_reach=0.1,
    )


def cka_map(comparison: CKAComparison, pair: str, input_name: str, measure: str = "debiased") -> Markup:
    """Every layer of the first model (row) against every layer of the second (column), of pooled states."""
    found = next(m for m in comparison.maps if (m["pair"], m["input"], m["measure"]) == (pair, input_name, measure))[
        "values"
    ]
    places = _places(range(len(found)))
    return charts.heat_strip(
        list(zip(places, found, strict=True)),
        _places(range(len(found[0]))),
        title=f"CKA ({measure}) of {pair} on {input_name}",
        value_format=decimal,
        centre=0.0,
        least_reach=1.0,
    )


def cka_figures(comparison: CKAComparison) -> list[tuple[str, Markup, str]]:
    """Heading, drawing and caption of each figure: values by layer, then every layer against every other."""
    figures = []
    for pair, name in dict.fromkeys((row["pair"], row["input"]) for row in comparison.rows):
        figures.append(
            (
                f"{pair}: layer by layer, on {name}",
                cka_strips(comparison, pair, name),
                "Debiased CKA of states averaged over each text. The stronger the colour, the more differs; below each "
                "strip, what random updates of the same size leave. Without massive dimensions, and standardised, so "
                "that a few dimensions do not decide.",
            )
        )
    for found in comparison.maps:
        if found["measure"] == "debiased":
            figures.append(
                (
                    f"{found['pair']}: every layer against every other, on {found['input']}",
                    cka_map(comparison, found["pair"], found["input"]),
                    "Rows are layers of the first model, columns those of the second.",
                )
            )
    return figures


def _places(layers: Iterable[int]) -> list[str]:
    return ["embedding" if layer == 0 else f"layer {layer}" for layer in layers]
