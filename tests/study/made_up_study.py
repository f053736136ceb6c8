"""A table of made-up measures: what the study would have seen if its claims held, and changes to that."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from prism_nemo.study.tidy import Table

Key = tuple[str, str, str]  # cell, measure, name
TASKS = ("arithmetic", "lists", "formulas")
FAMILIES = ("llama", "nemotron_h")
SEEDS = (1234, 1235, 1236)


def _accuracies() -> dict[Key, float]:
    found: dict[Key, float] = {}
    by_cell = {
        "base": (0.0, 0.0, 0.0), "mcs": (0.6, 0.6, 0.6), "mcs-again": (0.6, 0.6, 0.61),
        "rl-mcs-study-think": (0.75, 0.75, 0.75), "rl-mcs-no-science": (0.75, 0.75, 0.75),
        "rl-mc-study-think": (0.75, 0.75, 0.1), "rl-mcs-random": (0.6, 0.6, 0.6), "rl-mcs-shuffled": (0.6, 0.6, 0.6),
        **{f"rl-base-{x}-{y}": (0.01, 0.01, 0.01) for x in ("study", "own") for y in ("think", "free")},
    }  # fmt: skip
    for cell, values in by_cell.items():
        for task, value in zip(TASKS, values, strict=True):
            found[cell, "accuracy", task] = found[cell, "free_accuracy", task] = value
    return found


def _insides() -> dict[Key, float]:
    changed = {"mcs": 0.95, "rl-mcs-study-think": 0.06, "rl-base-study-think": 0.06, "rl-mcs-random": 0.5}
    found = {(cell, "changed_1_percent", "observed"): share for cell, share in changed.items()}
    for cell in ("mcs", "rl-mcs-study-think"):  # null models that are far from what is seen
        found[cell, "changed_1_percent", "random_walk"] = 0.5
        found[cell, "changed_1_percent", "drift"] = 0.6
    found["rl-mcs-study-think", "cka_plain_min", ""] = 0.9995
    found["rl-mcs-study-think", "cka_null_plain_min", ""] = 0.99
    losses = {"base": 4.0, "mcs": 4.05, "noret": 9.0, "rl-mcs-study-think": 4.06}
    return found | {(cell, "general_loss", ""): loss for cell, loss in losses.items()}


def made_up(
    changes: Mapping[Key, float] | None = None,
    jitter: float = 1.0,
    seeds: tuple[int, ...] = SEEDS,
    cosine: float = 0.1,
) -> Table:
    """Measures with which every claim holds, with some of them changed.

    Args:
        changes: Values by cell, measure and name.
        jitter: Times the difference between seeds.
        seeds: Which.
        cosine: Of the updates of RL from the base and from the mid-trained model.
    """
    values = {**_accuracies(), **_insides(), **(changes or {})}
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for family in FAMILIES:
        for seed in seeds:
            where = {"family": family, "seed": seed}
            for (cell, measure, name), value in values.items():
                # Where a difference of a thousandth counts, seeds differ by less.
                size = jitter * (0.00003 if measure.startswith("cka") else 0.003)
                noise = random.Random(f"{family}/{seed}/{cell}/{measure}/{name}").gauss(0.0, size)
                shifted = value + noise if value else value
                numbers = {"value": shifted, "low": None, "high": None, "n": 200}
                rows.append({**where, "cell": cell, "measure": measure, "name": name, **numbers})
            two = {"one": "rl-base-study-think", "two": "rl-mcs-study-think", "cosine": cosine}
            pairs.append({**where, **two, "same_sign": 0.5, "jaccard_1": 0.1, "by_size_of_weight_1": 0.1})
    return Table(rows, pairs, {"settings": {"base_steps": 500}, "cells_done": 64, "cells_planned": 64})
