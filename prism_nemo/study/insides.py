"""What happened inside a model beside the one it started from: weights, representations, and the way between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prism_nemo.analysis.cka import cka_by_layer
from prism_nemo.analysis.nulls import Schedule, nulls_of
from prism_nemo.analysis.path import Between
from prism_nemo.analysis.perturb import move_randomly
from prism_nemo.analysis.tally import Tally
from prism_nemo.analysis.weights import compare_checkpoints
from prism_nemo.checkpoint.native import load
from prism_nemo.data.held_out import held_out_rows
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import hidden_states
from prism_nemo.quickstart.corpus import HELD_OUT
from prism_nemo.study.behaviour import TASKS, answer, remember
from prism_nemo.study.settings import StudySettings

PATH_POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NULL_SEED = 11


def weight_change(parent: Path, own: Path, schedule: Schedule) -> tuple[dict[str, Any], dict[str, float]]:
    """Change of all weights with every null model beside it, and each tensor's relative distance.

    The schedule's nulls know nothing of the data: what lies within their range is no sign of what was learned.
    """
    compared = compare_checkpoints([parent, own], [(0, 1)], threads=1)[0][0]
    whole = Tally.sum(compared.tallies.values())
    found = {
        "total": compared.total.to_dict(),
        "by_component": {name: part.to_dict() for name, part in compared.by_component.items()},
        "nulls": {null.name: null.to_dict() for null in nulls_of(whole, False, schedule)},
    }
    return found, {name: part.relative_l2 or 0.0 for name, part in compared.tensors.items()}


@torch.no_grad()
def representations(
    model: LanguageModel, parent: Path, own: Path, distances: dict[str, float], data: Path, settings: StudySettings
) -> dict[str, Any]:
    """Linear CKA with the parent, plain and debiased, and that of the parent moved as far in a random direction.

    Args:
        model: Of the architecture; it is left with the random weights.
        parent: Checkpoint.
        own: Checkpoint.
        distances: From `weight_change`.
        data: Of the seed.
        settings: Rows.

    Returns:
        ``plain``, ``debiased`` and the same with ``null_`` before it, by place in the residual stream.
    """
    tokens, _ = held_out_rows(data / "tokens" / "base", HELD_OUT, settings.seq_length, settings.held_out_rows)
    states = {}
    for name, path in (("own", own), ("parent", parent), ("null", parent)):
        load(path, model)
        if name == "null":
            move_randomly(model, distances, _NULL_SEED)
        parts = [[state.float().mean(1) for state in hidden_states(model, part)] for part in tokens.split(32)]
        states[name] = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    found = {}
    for prefix, other in (("", "own"), ("null_", "null")):
        for kind in ("plain", "debiased"):
            found[prefix + kind] = cka_by_layer(states["parent"], states[other], debiased=kind == "debiased")
    return found


def way_between(
    model: LanguageModel, parent: Path, own: Path, data: Path, settings: StudySettings
) -> list[dict[str, Any]]:
    """General loss at points of the straight line from parent to model, and accuracy at its ends and middle.

    Both on a small sample; the model is left with the weights of the last point.
    """
    between = Between(model, [parent, own])
    found: list[dict[str, Any]] = []
    for alpha in PATH_POINTS:
        between.move((1 - alpha, alpha))
        general, _ = remember(model, data, settings.path_rows, settings.seq_length)
        point = {"alpha": alpha, "loss": general["loss"], "low": general["low"], "high": general["high"]}
        if alpha in (0.0, 0.5, 1.0):
            answers, _ = answer(model, data, settings.path_questions, settings.max_new_tokens)
            point["accuracy"] = {task: answers[task]["accuracy"] for task in TASKS}
        found.append(point)
    return found
