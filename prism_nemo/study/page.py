"""The page of the study: a row for each claim, its rule, its numbers and a figure; from the tidy tables alone."""

from __future__ import annotations

from pathlib import Path

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.study import sections
from prism_nemo.study.claims import CLAIMS, MENDED
from prism_nemo.study.effects import Effect
from prism_nemo.study.figures import accuracy_figure, claim_figure
from prism_nemo.study.sections import rows_of
from prism_nemo.study.tidy import Table
from prism_nemo.study.verdicts import Bound, Claim, decide


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
        write_text(target, claim_figure(table, claim))
        written.append(target)
    write_text(figures / "pocket_study_accuracy.svg", accuracy_figure(table))
    written.append(figures / "pocket_study_accuracy.svg")
    write_text(path, page(table))
    return written


def page(table: Table) -> str:
    """The page as Markdown."""
    groups = table.groups
    seeds = len({seed for _, seed in groups})
    done, planned = table.lineage.get("cells_done", 0), table.lineage.get("cells_planned", 0)
    command = _command(table)
    parts = [
        "# The study at pocket size",
        "Made by `prism-nemo study --page`, from the tables in `docs/data`; not written by hand. "
        f"Families: {', '.join(table.families)}. Seeds: {seeds}. Cells: {done} of {planned}. Test questions are only "
        "reported on: no checkpoint was chosen by them, every cell is its last step. Steps and rates were chosen in "
        "trials with other seeds and other test questions.",
        *_incomplete(done, planned),
        "The models have about a million parameters. What holds here need not hold at 8 billion, and the reverse; what "
        "a null model explains here is a reason to ask for that null model there.",
        "## Verdicts",
        rows_of(
            ["claim of the study", "verdict", "measured: mean [95 % interval over seeds]"],
            [_claim_row(table, claim) for claim in CLAIMS],
        ),
        "A bound is met or broken by the interval over seeds (Student's t; families averaged at each seed), and a "
        "difference must exceed that between any two seeds of one family. Seeds differ in texts, weights, batches and "
        "sampling of the training; test questions are the same, so the intervals are not about other questions.",
        f"{MENDED} The rules are `prism_nemo/study/claims.py` and `verdicts.py`.",
        f"To reproduce every row: `{command}`; one family alone: add `--families NAME`.",
    ]
    for claim in CLAIMS:
        parts += _section(table, claim)
    parts += ["## All cells", "![Accuracy of every cell](figures/pocket_study_accuracy.svg)"]
    parts += [sections.all_cells(table), "## Beside the null models", sections.nulls(table)]
    parts += ["## Which updates point the same way", sections.updates(table)]
    parts += ["## On the way between two models", sections.ways(table), "## How it was done", sections.how(table)]
    return "\n\n".join(parts) + "\n"


def _incomplete(done: int, planned: int) -> list[str]:
    if done >= planned:
        return []
    return [
        f"**The study is not complete: {planned - done} of its {planned} cells are not done.** Numbers of cells that "
        "are done do not change any more. A claim stays open until a second seed of every family is there."
    ]


def _command(table: Table) -> str:
    seeds = len({seed for _, seed in table.groups})
    return f"prism-nemo study --out study --seeds {seeds} --families {','.join(table.families)}"


def _claim_row(table: Table, claim: Claim) -> list[str]:
    families = claim.by_family(table)
    shown = []
    for number, bound in enumerate(families[None]):
        if not bound.told:
            apart = _apart(bound, {family: own[number] for family, own in families.items() if family is not None})
            seeds = _seeds_apart(bound)
            apart += f"; **{seeds}**" if seeds else ""
            shown.append(f"{bound.label}: {shown_effect(bound.effect, bound.digits)}{apart}")
    return [f"[{claim.text}](#{claim.key})", f"**{decide(families[None])}**", "<br>".join(shown)]


def _apart(whole: Bound, families: dict[str, Bound]) -> str:
    """Families on the other side of a bound than the mean over all: the mean alone would hide them."""
    if whole.effect is None or len(families) < 2:
        return ""
    inside = whole.allows(whole.effect.mean)
    found = [
        f"{family} {own.effect.mean:.{own.digits}f}"
        for family, own in families.items()
        if own.effect is not None and own.allows(own.effect.mean) != inside
    ]
    return f"; **on the other side of the bound: {', '.join(found)}**" if found else ""


def _seeds_apart(bound: Bound) -> str:
    """That two seeds differ by as much as a difference which is claimed, where they do."""
    e = bound.effect
    if not bound.difference or e is None or e.spread is None or e.clear:
        return ""
    return f"two seeds of one family differ by {e.spread:.{bound.digits}f}"


def shown_effect(found: Effect | None, digits: int = 4) -> str:
    """Mean and interval, or that it was not measured."""
    if found is None:
        return "not measured"
    if found.spread is None:
        return f"{found.mean:.{digits}f} [one seed: no interval]"
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _section(table: Table, claim: Claim) -> list[str]:
    rows = []
    for family, bounds in claim.by_family(table).items():
        for bound in bounds:
            values = () if bound.effect is None or family is None else bound.effect.values
            seeds = ", ".join(f"{value:.{bound.digits}f}" for value in values)
            shown = shown_effect(bound.effect, bound.digits)
            state = ": ".join(filter(None, (bound.state, _seeds_apart(bound))))
            rows.append([bound.label, family or "all", shown, seeds, bound.asked, state])
    return [
        f'<a id="{claim.key}"></a>',  # the same anchor wherever the page is shown; names made from titles are not
        f"## {claim.text}",
        f"Asked: {claim.rule}.",
        claim.limits,
        f"![{claim.text}](figures/pocket_study_{claim.key}.svg)",
        rows_of(["effect", "family", "mean [95 %]", "seeds", "bound", "state"], rows),
    ]
