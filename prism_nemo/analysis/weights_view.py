"""`analyze weights` for people: observed beside null models, in tables that fit a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prism_nemo.analysis.change import KEYS, WeightChange
from prism_nemo.analysis.nulls import Null
from prism_nemo.analysis.weights_report import Transition, WeightsReport

# Narrower than this the tables do not fit; a pipe counts as 80 columns.
MIN_WIDTH = 124
_NULLS = {"decay": "decay alone", "random_walk": "random walk", "drift": "drift", "fitted": "fitted"}


def weights_view(report: WeightsReport) -> RenderableType:
    """Everything that was found, but for single layers and tensors (they are in the files of --out)."""
    parts: list[RenderableType] = []
    for transition in report.transitions:
        parts += [Text(f"\n{transition.name}", "bold cyan"), _about(transition), _thresholds(transition), Text("")]
        parts.append(_components(transition))
        if transition.spectra:
            parts += [Text(""), _spectra(transition)]
    if report.overlaps:
        parts += [Text("\nTwo updates beside each other", "bold cyan"), _overlaps(report)]
    if len(report.trajectory) > 1:
        parts += [Text("\nDistance from the first checkpoint", "bold cyan"), _trajectory(report)]
    parts.append(
        Text(
            "\ndecay alone, random walk, drift: what the stage's learning rates and weight decay give without any data."
            " fitted: a Gaussian that knows nothing of the weights, of the one size that gives the observed share above"
            " 1 %. Only what differs from these remains to be explained.",
            "dim",
        )
    )
    return Group(*parts)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}" if value > 1e-3 or value == 0 else f"{100 * value:.2g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _about(transition: Transition) -> Text:
    total = transition.comparison.total
    said = ", ".join(
        (
            f"{total.parameters:,} parameters",
            f"relative distance {_number(total.relative_l2)}",
            f"{_percent(total.equal_fraction)} % equal ({_percent(total.bf16_equal_fraction)} % in bf16)",
            f"along the weights {_number(total.drift)}",
            f"{_percent(total.sign_flip_fraction)} % changed their sign",
        )
    )
    if transition.schedule is not None:
        s = transition.schedule
        said += (
            f"\n{s.steps:,} updates; sum of learning rates {s.lr_sum:.3g}; weight decay leaves "
            f"{s.decay_factor:.4f} of a weight"
        )
    return Text(said)


def _thresholds(transition: Transition) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("% of parameters changed by more than")
    for key in KEYS:
        table.add_column(f"{key} %", justify="right")
    table.add_column("relative distance", justify="right")
    total = transition.comparison.total
    table.add_row("observed", *(_percent(total.thresholds[key]) for key in KEYS), _number(total.relative_l2))
    for null in transition.nulls.get("total", []):
        values = (_percent(null.thresholds[key]) for key in KEYS)
        table.add_row(_NULLS[null.name], *values, _number(null.relative_l2), style="dim")
    return table


def _components(transition: Transition) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("component", no_wrap=True)
    for name in ("parameters", "distance", "drift", "> 1 %"):
        table.add_column(name, justify="right")
    shown = [n for n in _NULLS if any(null.name == n for found in transition.nulls.values() for null in found)]
    shown = [name for name in shown if name != "fitted"]
    for name in shown:
        table.add_column(_NULLS[name], justify="right", style="dim")
    table.add_column("> 5 %", justify="right")
    table.add_column("fitted", justify="right", style="dim")
    table.add_column("> 1 % of small | large", justify="right", no_wrap=True)
    for part, change in transition.comparison.by_subcomponent.items():
        nulls = {null.name: null for null in transition.nulls.get(part, [])}
        table.add_row(
            part,
            f"{change.parameters:,}",
            _number(change.relative_l2),
            _number(change.drift),
            _percent(change.thresholds["1"]),
            *(_share(nulls.get(name), "1") for name in shown),
            _percent(change.thresholds["5"]),
            _share(nulls.get("fitted"), "5"),
            _tenths(change),
        )
    return table


def _share(null: Null | None, key: str) -> str:
    return "-" if null is None else _percent(null.thresholds[key])


def _tenths(change: WeightChange) -> str:
    return f"{_percent(change.deciles[0])} | {_percent(change.deciles[-1])}" if change.deciles else "-"


def _spectra(transition: Transition) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("update of", "norm", "stable rank", "effective rank", "of a random one", "energy in the largest"):
        table.add_column(name, justify="left" if name == "update of" else "right", no_wrap=name == "update of")
    for name, spectrum in transition.spectra.items():
        if spectrum is None:
            table.add_row(name, "0")
            continue
        table.add_row(
            name,
            _number(spectrum.frobenius),
            f"{spectrum.stable_rank:.1f}",
            f"{spectrum.participation:.1f}",
            f"{spectrum.random_participation:.1f}",
            f"{_percent(spectrum.energy)} % in {len(spectrum.values)}",
        )
    return table


def _overlaps(report: WeightsReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("first | second", "cosine", "same sign", "changed > 1 % by both / either", "by chance", "by size"):
        table.add_column(name, justify="left" if name == "first | second" else "right")
    for (a, b), found in report.overlaps.items():
        total = found.total
        table.add_row(
            f"{report.transitions[a].name} | {report.transitions[b].name}",
            _number(total.cosine),
            f"{_percent(total.same_sign)} %",
            _percent(total.jaccard["1"]),
            _percent(total.by_chance["1"]),
            _percent(total.by_size_of_weight["1"]),
        )
    return table


def _trajectory(report: WeightsReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("checkpoint", "distance", "% of the last one's", "> 1 %"):
        table.add_column(name, justify="left" if name == "checkpoint" else "right")
    for row in report.trajectory:
        share = row["share_of_final_distance"]
        changed = _percent(row["changed_fraction_1pct"])
        table.add_row(row["checkpoint"], _number(row["relative_l2"]), _percent(share), changed)
    return table
