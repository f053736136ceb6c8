"""The tables of the study's page that belong to no single claim: cells, nulls, updates, ways, and how it was done."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from prism_nemo.study.behaviour import TASKS
from prism_nemo.study.claims import mean_of_tasks
from prism_nemo.study.effects import effect
from prism_nemo.study.figures import models
from prism_nemo.study.insides import PATH_POINTS
from prism_nemo.study.tidy import LINEAGE, MEASURES, UPDATES, Table

_MOVED = (
    "mcs",
    "noret",
    "mcs-rl-rate",
    "mcs-longer",
    "rl-mcs-study-think",
    "rl-mcs-random",
    "rl-mcs-x10",
    "rl-base-study-think",
)
_NULLS = ("decay", "random_walk", "drift")
_CKA = ("plain", "null_plain", "debiased", "null_debiased")


def all_cells(table: Table) -> str:
    """What every model does."""
    head = ["cell", *TASKS, "general loss", "tokens forgotten", "learned", "length", "entropy", "changed > 1 %", "CKA"]
    rows = []
    for cell in models():
        name = cell.name
        shown = [_mean(table, name, "accuracy", task, 3) for task in TASKS]
        shown.append(_mean(table, name, "general_loss", "", 3))
        shown += [_mean(table, name, f"{what}_since_base", "general", 0) for what in ("forgotten", "learned")]
        shown.append(_mean_of_tasks(table, name, "response_tokens", 1))
        shown.append(_mean_of_tasks(table, name, "entropy", 3))
        shown.append(_mean(table, name, "changed_1_percent", "observed", 3))
        shown.append(_mean(table, name, "cka_plain_min", "", 4))
        rows.append([name, *shown])
    return (
        "Means over seeds and families; accuracy is sampled at temperature 1 under the `<think>` gate, also of what "
        "was trained without it (`free`). General text is Python's own library sources. Forgotten are tokens of it, "
        f"held out, that the base puts first ({_right_before(table)} on average) and the model does not; learned the "
        "reverse. Every number by family and "
        f"seed is in [`{MEASURES}`](data/{MEASURES}), every two updates in [`{UPDATES}`](data/{UPDATES}), where they "
        f"came from in [`{LINEAGE}`](data/{LINEAGE}).\n\n{rows_of(head, rows)}"
    )


def nulls(table: Table) -> str:
    """Changes of weights and representations beside their null models."""
    head = ["cell", "changed > 1 %", *(f"null: {name.replace('_', ' ')}" for name in _NULLS), "relative distance"]
    head += [f"CKA {name.replace('_', ' ')}" for name in _CKA]
    rows = []
    for name in _MOVED:
        shown = [_mean(table, name, "changed_1_percent", of, 3) for of in ("observed", *_NULLS)]
        shown.append(_mean(table, name, "relative_l2", "observed", 4))
        shown += [_mean(table, name, f"cka_{of}_min", "", 4) for of in _CKA]
        rows.append([name, *shown])
    return (
        "The nulls of weights know the learning rates, the weight decay and the number of updates, and nothing of the "
        "data: *decay* shrinks every weight, *random walk* moves each by its rate in a direction drawn anew for every "
        "update, *drift* always in the same. The null of CKA is the model's start, moved as far at random. CKA is that "
        f"of the layer where it is least, on general text, before the final norm.\n\n{rows_of(head, rows)}"
    )


def updates(table: Table) -> str:
    """Which updates point the same way."""
    one = "rl-mcs-study-think"
    measures = ("cosine", "same_sign", "jaccard_1", "by_size_of_weight_1")
    pairs = [(pair["one"], pair["two"]) for pair in table.pairs]
    names = dict.fromkeys(name for pair in pairs if one in pair for name in pair if name != one)
    rows = [[name, *(_pair(table, one, name, measure) for measure in measures)] for name in names]
    head = ["update", "cosine", "same sign", "overlap of weights changed > 1 %", "overlap expected by size of weight"]
    return (
        f"Each beside the update of `{one}`. Weights that are small change by more than 1 % in any update, so two "
        f"updates that have nothing in common overlap as much as the last column says.\n\n{rows_of(head, rows)}"
    )


def ways(table: Table) -> str:
    """General loss on the straight line from a model's start to the model."""
    head = ["cell", *(f"{alpha:g}" for alpha in PATH_POINTS)]
    rows = [[name, *(_mean(table, name, "path_loss", f"{a:.2f}", 3) for a in PATH_POINTS)] for name in _MOVED]
    return (
        "General loss on the way from the start (0) to the model (1), with the weights of both mixed; on fewer rows "
        f"than above. A hill between the ends would be two valleys.\n\n{rows_of(head, rows)}"
    )


def rows_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _shown(table: Table, of: Callable[[str, int], float | None], digits: int) -> str:
    found = effect(table, of)
    return "-" if found is None else f"{found.mean:.{digits}f}"


def _mean(table: Table, cell: str, measure: str, name: str, digits: int) -> str:
    return _shown(table, lambda family, seed: table.value(family, seed, cell, measure, name), digits)


def _pair(table: Table, one: str, two: str, measure: str) -> str:
    return _shown(table, lambda family, seed: table.pair(family, seed, one, two, measure), 3)


def _mean_of_tasks(table: Table, cell: str, measure: str, digits: int) -> str:
    return _shown(table, mean_of_tasks(table, cell, measure), digits)


def _right_before(table: Table) -> str:
    counts = [
        r["n"] for r in table.rows if r["measure"] == "forgotten_since_base" and r["name"] == "general" and r["n"]
    ]
    return f"{statistics.fmean(counts):,.0f}" if counts else "-"


def how(table: Table) -> str:
    """Budget, cost, machine, outcomes."""
    settings: dict[str, float] = table.lineage.get("settings", {})
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
        f"({cost['cpu_seconds'] / 3600:.1f} hours of processor time; {'; '.join(machines)}), without making the texts, "
        "and models again that a stop had lost. "
        if cost
        else ""
    )
    return (
        f"{took}Which cells there are, and which crossings were left out and why, is in `prism_nemo/study/plan.py`. "
        f"Outcomes: {counted}; a cell with no prompts is the model that it would have started from. "
        f"Settings: {budget}. Hybrids get `hybrid_share` of the steps before RL: they learn these tasks in fewer."
    )
