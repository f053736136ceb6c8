"""What `analyze weights` found as figures: each stage's changes beside its null models."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from prism_nemo.analysis.change import KEYS
from prism_nemo.analysis.weights_report import Transition, WeightsReport
from prism_nemo.report.charts import Bar, heat_strip, horizontal_bars
from prism_nemo.report.formatting import percent, significant
from prism_nemo.report.svg import Style

_OBSERVED = Style("s-prism-rl")
_NULLS = {
    "decay": ("decay alone", Style("s-base")),
    "random_walk": ("random walk", Style("s-midtrained")),
    "drift": ("drift", Style("s-longer")),
    "fitted": ("fitted Gaussian", Style("s-base-rl")),
}
_LAYERS = 8  # more than a few transitions would make the strips unreadable

Figure = tuple[str, Markup, str]


def weights_figures(report: WeightsReport) -> list[Figure]:
    """Heading, drawing and caption of each figure."""
    figures: list[Figure] = []
    for transition in report.transitions:
        figures += _of_transition(transition)
    if report.overlaps:
        figures.append(_overlaps(report))
    layers = _layers(report)
    return [*figures, layers] if layers is not None else figures


def _of_transition(transition: Transition) -> Iterator[Figure]:
    total, nulls = transition.comparison.total, transition.nulls.get("total", [])
    bars = []
    for key in KEYS:
        group = f"changed by more than {key} %"
        bars.append(_bar("observed", _OBSERVED, total.thresholds[key], group))
        bars += [_bar(*_NULLS[null.name], null.thresholds[key], group) for null in nulls]
    yield (
        f"{transition.name}: share of parameters that changed",
        horizontal_bars(
            bars, title="Share of parameters changed", tick_format=lambda v: percent(v, 0), x_range=(0.0, 1.0),
            labels=130, width=860,
        ),
        "Relative to each parameter's own size. The null models know nothing of the data: they are given the stage's "
        "learning rates and weight decay, or (fitted) the one size of update that gives the observed share above 1 %.",
    )  # fmt: skip
    bars = []
    for part, change in transition.comparison.by_subcomponent.items():
        bars.append(_bar("observed", _OBSERVED, change.thresholds["1"], part))
        for null in transition.nulls.get(part, []):
            if null.name != "fitted":  # which is the observed share, as it was fitted to it
                bars.append(_bar(*_NULLS[null.name], null.thresholds["1"], part))
    yield (
        f"{transition.name}: changed by more than 1 %, by component",
        horizontal_bars(
            bars, title="Share changed by more than 1 %, by component", tick_format=lambda v: percent(v, 0),
            x_range=(0.0, 1.0), labels=130, width=860,
        ),
        "A component of small weights passes 1 % with the same update that leaves one of large weights as it was.",
    )  # fmt: skip
    if total.deciles:
        columns = [f"{i}" for i in range(1, len(total.deciles) + 1)]
        rows = [("observed", total.deciles)] + [
            (_NULLS[null.name][0], null.deciles) for null in nulls if len(null.deciles) == len(columns)
        ]
        yield (
            f"{transition.name}: share above 1 % in each tenth of the parameters by size",
            heat_strip(
                rows, columns, title="Share above 1 %, by tenth of size", value_format=percent, centre=0.0,
                least_reach=1e-12,
            ),
            "From the smallest (1) to the largest (10). Where the null model has the same strip, the parameters that "
            "changed are simply the small ones.",
        )  # fmt: skip


def _overlaps(report: WeightsReport) -> Figure:
    bars = []
    for (a, b), found in report.overlaps.items():
        group = f"{report.transitions[a].name} and {report.transitions[b].name}"
        total = found.total
        bars.append(_bar("observed", _OBSERVED, total.jaccard["1"], group))
        bars.append(_bar("by size of weight", Style("s-base-rl"), total.by_size_of_weight["1"], group))
        bars.append(_bar("by chance", Style("s-base"), total.by_chance["1"], group))
        cosine = total.cosine
        shown = "-" if cosine is None else significant(cosine)
        bars.append(Bar("cosine", Style("s-midtrained"), None if cosine is None else max(0.0, cosine), shown, group))
    return (
        "Do two stages change the same parameters?",
        horizontal_bars(bars, title="Overlap of two updates", x_range=(0.0, 1.0), labels=130, width=860),
        "Of the parameters that either stage changed by more than 1 %, the share that both did; what two independent "
        "updates of the same weights would share because small weights pass 1 % first; and the cosine of both updates "
        "(negative ones are drawn as 0).",
    )


def _layers(report: WeightsReport) -> Figure | None:
    rows = [
        (t.name, [change.relative_l2 for change in t.comparison.by_layer.values()])
        for t in report.transitions[:_LAYERS]
    ]
    columns = list(report.transitions[0].comparison.by_layer)
    if not columns:
        return None
    return (
        "Relative distance by layer",
        heat_strip(
            rows, columns, title="Relative distance by layer", value_format=significant, centre=0.0, least_reach=1e-12
        ),
        "||after - before|| / ||before|| over all parameters of a layer.",
    )


def _bar(label: str, style: Style, value: float | None, group: str) -> Bar:
    return Bar(label, style, value, "-" if value is None else percent(value), group)
