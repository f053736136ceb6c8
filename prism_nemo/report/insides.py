"""The part about what changed inside the model: weights by component, and representations by layer."""

from __future__ import annotations

from collections.abc import Sequence

from prism_nemo.report import charts
from prism_nemo.report.formatting import decimal, percent, significant
from prism_nemo.report.read import Record, mapping, number, objects, sequence
from prism_nemo.report.stages import pair
from prism_nemo.report.view import Figure, Table

EXPECTED_WEIGHTS = ("base->midtrained", "midtrained->prism_rl", "base->base_rl")
EXPECTED_CKA = ("base/midtrained", "midtrained/prism_rl", "base/base_rl")
MEASURES = (
    (
        "changed_fraction_1pct",
        "Weights that moved by more than 1%",
        "Share of single weights whose value changed by more than 1% of itself.",
    ),
    (
        "relative_l2",
        "Distance travelled",
        "Length of the change divided by the length of the weights before it (relative L2).",
    ),
)


def weight_figures(record: Record) -> list[Figure]:
    """Draws how far each stage moved the weights, whole and by component, and by layer if that was measured."""
    found = {name: mapping(value) for name, value in mapping(record.summary.get("weights")).items()}
    for name in EXPECTED_WEIGHTS:
        if name not in found:
            record.missing(f"Weight change {pair(name, '->').label}")
    names = [name for name in EXPECTED_WEIGHTS if name in found] + [n for n in found if n not in EXPECTED_WEIGHTS]
    figures = [_weight_figure(record, found, names, *measure) for measure in MEASURES]
    layers = [_layer_figure(found, names, *measure) for measure in MEASURES]
    return figures + [figure for figure in layers if figure is not None]


def cka_figure(record: Record) -> Figure:
    """Draws the similarity of the representations at every position of the residual stream as a heat strip."""
    found = {name: mapping(value) for name, value in mapping(record.summary.get("cka")).items()}
    for name in EXPECTED_CKA:
        if name not in found:
            record.missing(f"CKA {pair(name, '/').label}")
    names = [name for name in EXPECTED_CKA if name in found] + [n for n in found if n not in EXPECTED_CKA]
    strips, rows = [], []
    length = max((len(sequence(found[name].get("by_layer"))) for name in names), default=0)
    columns = ["embedding"] + [f"layer {place}" for place in range(1, length)]
    for name in names:
        values = [number(value) for value in sequence(found[name].get("by_layer"))]
        lowest = record.number(found[name].get("min"), f"CKA {pair(name, '/').label}: lowest value")
        strips.append((pair(name, "/").short, values))
        padded = values + [None] * (length - len(values))
        rows.append((pair(name, "/").label, *(decimal(value, 4) for value in padded), decimal(lowest, 4)))
    svg = charts.heat_strip(
        strips, columns, title="Similarity of representations (CKA)", value_format=decimal, centre=1.0, least_reach=0.1
    )
    caption = (
        "Linear CKA on the same text, after the embedding and after each layer. 1 means that both models represent the "
        "text alike up to rotation and scale; the stronger the colour, the more the stage changed there."
    )
    table = Table(("comparison", *columns, "lowest"), rows, "CKA by layer")
    return Figure("Similarity of representations (CKA)", svg, caption, table, wide=True)


def _weight_figure(
    record: Record, found: dict[str, dict[str, object]], names: Sequence[str], key: str, title: str, caption: str
) -> Figure:
    components = list(dict.fromkeys(part for name in names for part in mapping(found[name].get("by_component"))))
    fraction = key == "changed_fraction_1pct"
    bars, rows = [], []
    for component in ["all weights", *components]:
        for name in names:
            two = pair(name, "->")
            whole = component == "all weights"
            source = found[name] if whole else mapping(mapping(found[name].get("by_component")).get(component))
            what = f"Weight change {two.label}, {component}: {title.lower()}"
            value = record.share(source.get(key), what) if fraction else record.number(source.get(key), what)
            shown = percent(value) if fraction else significant(value)
            bars.append(charts.Bar(two.short, two.style, value, shown, component))
            rows.append((f"{component}: {two.label}", shown))
    svg = charts.horizontal_bars(
        bars,
        title=title,
        tick_format=(lambda value: percent(value, 0)) if fraction else None,
        x_range=(0.0, 1.0) if fraction else None,
        labels=142,
    )
    return Figure(title, svg, caption, Table(("component and stage", "value"), rows, title))


def _layer_figure(
    found: dict[str, dict[str, object]], names: Sequence[str], key: str, title: str, caption: str
) -> Figure | None:
    by_layer = {name: [number(layer.get(key)) for layer in objects(found[name].get("by_layer"))] for name in names}
    measured = [name for name in names if any(value is not None for value in by_layer[name])]
    if not measured:
        return None
    shown = percent if key == "changed_fraction_1pct" else significant
    columns = [f"layer {place + 1}" for place in range(max(len(by_layer[name]) for name in measured))]
    strips = [(pair(name, "->").short, by_layer[name]) for name in measured]
    svg = charts.heat_strip(
        strips, columns, title=f"{title}, by layer", value_format=shown, centre=0.0, least_reach=1e-12
    )
    width = len(columns)
    rows = [
        (label, *(shown(value) for value in [*values, *[None] * (width - len(values))])) for label, values in strips
    ]
    return Figure(f"{title}, by layer", svg, caption, Table(("stage", *columns), rows, title), wide=True)
