"""The page of the study: a row for each claim, its rule, its numbers and a figure; from the tidy tables alone."""

from __future__ import annotations

import math
from pathlib import Path

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.report.charts import Estimate, interval_rows
from prism_nemo.report.svg import Style
from prism_nemo.study.behaviour import TASKS
from prism_nemo.study.effects import Effect, effect
from prism_nemo.study.tidy import LINEAGE, MEASURES, UPDATES, Table
from prism_nemo.study.verdicts import CLAIMS, Bound, Claim, decide

_STYLES = (Style("s-base", "circle"), Style("s-midtrained", "square"), Style("s-prism-rl", "star"),
           Style("s-base-rl", "triangle"))  # fmt: skip
_CSS = Path(__file__).parent.parent / "report" / "page.css"
_CELLS = (
    "base", "math", "mc", "mcs", "noret", "mcs-again", "mcs-rl-rate", "rl-base-study-think", "rl-base-study-free",
    "rl-base-own-think", "rl-base-own-free", "rl-base-random", "rl-math-study-think", "rl-math-own-think",
    "rl-mc-study-think", "rl-mc-own-think", "rl-mc-no-science", "rl-mcs-study-think", "rl-mcs-study-free",
    "rl-mcs-no-science", "rl-noret-study-think", "rl-noret-own-think", "rl-mcs-random", "rl-mcs-shuffled",
    "rl-mcs-format_only", "rl-mcs-x10",
)  # fmt: skip


def write_page(table: Table, path: Path) -> list[Path]:
    """Write the page and its figures (in ``figures`` beside it).

    Returns:
        The files.
    """
    figures = path.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    written = [path]
    for claim in CLAIMS:
        target = figures / f"pocket_study_{claim.key}.svg"
        write_text(target, _figure(table, claim))
        written.append(target)
    write_text(path, page(table))
    return written


def page(table: Table) -> str:
    """The page as Markdown."""
    groups = table.groups
    seeds = len({seed for _, seed in groups})
    settings = table.lineage.get("settings", {})
    done, planned = table.lineage.get("cells_done", 0), table.lineage.get("cells_planned", 0)
    command = _command(table)
    parts = [
        "# The study at pocket size",
        "Made by `prism-nemo study --page`, from the tables in `docs/data`; not written by hand. "
        f"Families: {', '.join(table.families)}. Seeds: {seeds}. Cells: {done} of {planned}. Test questions are only "
        "reported on: no checkpoint was chosen by them, every cell is its last step. Steps and rates were chosen in "
        "trials with other seeds and other test questions.",
        "The models have about a million parameters. What holds here need not hold at 8 billion, and the reverse; what "
        "a null model explains here is a reason to ask for that null model there.",
        "## Verdicts",
        "| claim of the study | verdict | measured: mean [95 % interval over seeds] |\n|---|---|---|\n"
        + "\n".join(_claim_row(table, claim) for claim in CLAIMS),
        "A bound is met or broken by the interval over seeds (Student's t; families averaged at each seed), and a "
        "difference must exceed that between any two seeds of one family. The rules are "
        "`prism_nemo/study/verdicts.py`; they were written before any result.",
        f"To reproduce every row: `{command}`; one family alone: add `--families NAME`.",
    ]
    for claim in CLAIMS:
        parts += _section(table, claim)
    parts += ["## All cells", _all_cells(table), "## How it was done", _how(settings, table)]
    return "\n\n".join(parts) + "\n"


def _command(table: Table) -> str:
    seeds = len({seed for _, seed in table.groups})
    return f"prism-nemo study --out study --seeds {seeds} --families {','.join(table.families)}"


def _claim_row(table: Table, claim: Claim) -> str:
    bounds = claim.bounds(table, None)
    shown = "; ".join(f"{bound.label}: {shown_effect(bound.effect)}" for bound in bounds)
    return f"| [{claim.text}](#{_anchor(claim)}) | **{decide(bounds)}** | {shown} |"


def _anchor(claim: Claim) -> str:
    kept = "".join(c for c in claim.text.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def shown_effect(found: Effect | None) -> str:
    """Mean and interval, or that it was not measured."""
    if found is None:
        return "not measured"
    if found.spread is None:
        return f"{found.mean:.4f} [one seed: no interval]"
    return f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"


def _section(table: Table, claim: Claim) -> list[str]:
    rows = ["| effect | family | mean [95 %] | seeds | bound | state |", "|---|---|---|---|---|---|"]
    for family in (None, *table.families):
        for bound in claim.bounds(table, family):
            values = "" if bound.effect is None else ", ".join(f"{value:.4f}" for value in bound.effect.values)
            rows.append(
                f"| {bound.label} | {family or 'all'} | {shown_effect(bound.effect)} | {values if family else ''} | "
                f"{_range(bound)} | {bound.state} |"
            )
    return [
        f"## {claim.text}",
        f"Asked: {claim.rule}.",
        f"![{claim.text}](figures/pocket_study_{claim.key}.svg)",
        "\n".join(rows),
    ]


def _range(bound: Bound) -> str:
    sides = []
    if math.isfinite(bound.low):
        sides.append(f"at least {bound.low:g}")
    if math.isfinite(bound.high):
        sides.append(f"at most {bound.high:g}")
    return ", ".join(sides) + (", more than between seeds" if bound.difference else "")


def _figure(table: Table, claim: Claim) -> str:
    """Each effect, of all families and of each, with its interval over seeds, as an SVG that stands alone."""
    rows = []
    for number, bound in enumerate(claim.bounds(table, None)):
        style = _STYLES[number % len(_STYLES)]
        for family in (None, *table.families):
            e = claim.bounds(table, family)[number].effect
            label = f"{bound.label} ({family or 'all'})"
            known = e is not None and e.spread is not None
            low, high = (e.low, e.high) if e is not None and known else (None, None)
            rows.append(Estimate(label, style, None if e is None else e.mean, low, high))
    # The axis is that of the means: an interval of two seeds may be ten times as wide, and would hide them.
    means = [row.value for row in rows if row.value is not None]
    reach = None
    if means:
        pad = max(0.02, 0.6 * (max(means) - min(means)))
        reach = (min(*means, 0.0) - pad, max(*means, 0.0) + pad) if claim.key != "cka" else None
    drawing = interval_rows(
        rows, title=claim.text, value_format=lambda value: f"{value:.3f}", x_range=reach,
        reference=None if claim.key == "cka" else 0.0, width=760,
    )  # fmt: skip
    svg = str(drawing)
    css = f"<style>{_CSS.read_text(encoding='utf-8')} svg {{ background: var(--surface, #fff); }}</style>"
    head, _, rest = svg.partition(">")
    if "xmlns=" not in head:
        head += ' xmlns="http://www.w3.org/2000/svg"'
    return f"{head}>{css}{rest}\n"


def _all_cells(table: Table) -> str:
    lines = [
        "Means over seeds and families; accuracy is sampled at temperature 1 under the `<think>` gate. Every number by "
        f"family and seed is in [`{MEASURES}`](data/{MEASURES}), every two updates in [`{UPDATES}`](data/{UPDATES}), "
        f"where they came from in [`{LINEAGE}`](data/{LINEAGE}).",
        "",
        "| cell | "
        + " | ".join(TASKS)
        + " | general loss | tokens forgotten | length | entropy | changed > 1 % | CKA |",
        "|---|" + "---|" * (len(TASKS) + 6),
    ]
    for cell in _CELLS:
        shown = [_mean(table, cell, "accuracy", task, 3) for task in TASKS]
        shown.append(_mean(table, cell, "general_loss", "", 3))
        shown.append(_mean(table, cell, "forgotten_since_base", "general", 0))
        shown.append(_mean_of_tasks(table, cell, "response_tokens", 1))
        shown.append(_mean_of_tasks(table, cell, "entropy", 3))
        shown.append(_mean(table, cell, "changed_1_percent", "observed", 3))
        shown.append(_mean(table, cell, "cka_plain_min", "", 4))
        lines.append(f"| {cell} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _mean(table: Table, cell: str, measure: str, name: str, digits: int) -> str:
    found = effect(table, lambda family, seed: table.value(family, seed, cell, measure, name))
    return "-" if found is None else f"{found.mean:.{digits}f}"


def _mean_of_tasks(table: Table, cell: str, measure: str, digits: int) -> str:
    def of(family: str, seed: int) -> float | None:
        values = [table.value(family, seed, cell, measure, task) for task in TASKS]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    found = effect(table, of)
    return "-" if found is None else f"{found.mean:.{digits}f}"


def _how(settings: dict[str, float], table: Table) -> str:
    budget = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    outcomes: dict[str, int] = {}
    for row in table.rows:
        if row["measure"] == "outcome":
            outcomes[row["name"]] = outcomes.get(row["name"], 0) + 1
    counted = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
    cost, processes = table.lineage.get("cost", {}), table.lineage.get("processes", 1)
    machines = [", ".join(f"{key} {value}" for key, value in one.items()) for one in table.lineage.get("machines", [])]
    took = (
        f"It took {cost['seconds'] / processes / 3600:.1f} hours on {processes} cores "
        f"({cost['cpu_seconds'] / 3600:.1f} hours of processor time; {'; '.join(machines)}). "
        if cost
        else ""
    )
    return (
        f"{took}Which cells there are, and which crossings were left out and why, is in `prism_nemo/study/plan.py`. "
        f"Outcomes: {counted}; a cell with no prompts is the model that it would have started from. "
        f"Settings: {budget}. Hybrids get `hybrid_share` of the steps before RL: they learn these tasks in fewer."
    )
