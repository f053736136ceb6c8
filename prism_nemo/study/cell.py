"""One cell from start to end, in a process of its own: train, measure, keep the measures."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch

from prism_nemo.analysis.weights import compare_checkpoints
from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import PrismError
from prism_nemo.models.build import build_model
from prism_nemo.runtime import start, stop
from prism_nemo.study import behaviour, insides, training
from prism_nemo.study.corpus import prepare
from prism_nemo.study.folders import Folders
from prism_nemo.study.plan import Cell
from prism_nemo.study.settings import StudySettings

# Updates that are compared with each other: from other starts, with other rewards, and the same again.
COMPARED = (
    "rl-mcs-study-think", "rl-mcs-no-science", "rl-mcs-random", "rl-mcs-shuffled", "rl-mcs-format_only", "rl-mcs-x10",
    "rl-mc-study-think", "rl-math-study-think", "rl-noret-study-think", "rl-base-study-think", "rl-base-own-free",
    "rl-base-random", "mcs", "mcs-again", "mcs-rl-rate",
)  # fmt: skip


def run_cell(out: str, settings: StudySettings, cell: Cell, group: list[Cell], rebuild: bool = False) -> float:
    """Do a cell, or train its model once more because it was dropped.

    Args:
        out: Folder of the study; becomes the working directory of this process.
        settings: Of the study.
        cell: What to do.
        group: All cells of its family and seed.
        rebuild: Only train, and see that the weights are those that were measured.

    Returns:
        Seconds of processor time.

    Raises:
        PrismError: If training fails, or a rebuilt model is another one than before.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(out)  # prompt files are named from here, so that another folder gives the same numbers
    folders, cells = Folders(Path(out)), {one.name: one for one in group}
    began, cpu = time.time(), time.process_time()
    if cell.kind == "data":
        prepare(folders.data(cell.seed), settings, cell.seed)
        return time.process_time() - cpu
    if cell.kind == "filter":
        measures: dict[str, Any] = {"outcome": "filtered", "tasks": training.filter_prompts(cell, folders, settings)}
    elif cell.kind == "updates":
        measures = {"outcome": "compared", **_updates(cells, folders)}
    else:
        measures = training.build_model_of(cell, folders, settings)
    trained = time.process_time() - cpu
    if rebuild:
        _check_rebuilt(cell, cells, folders, measures)
        return trained
    if cell.has_model and measures["outcome"] != "diverged":
        measures.update(_measure(cell, cells, folders, settings, measures["outcome"]))
    spent = time.process_time() - cpu
    folders.write(cell, "timing", {"seconds": time.time() - began, "cpu_seconds": spent, "training_cpu": trained})
    folders.write(cell, "measures", {"cell": cell.key, **measures})  # last: it says that the cell is done
    return spent


def _check_rebuilt(cell: Cell, cells: dict[str, Cell], folders: Folders, measures: dict[str, Any]) -> None:
    known = folders.read(cell) or {}
    if cell.kind == "filter":
        same = known.get("tasks") == measures["tasks"]
    else:
        same = known.get("weights_sha256") == _weights_sha256(cell, cells, folders)
    if not same:
        raise PrismError(
            f"{cell.key}: made again, it is another one than was measured (other machine or versions?); remove "
            f"{folders.results(cell)} and all that starts from it, and run the study again"
        )


def _measure(
    cell: Cell, cells: dict[str, Cell], folders: Folders, settings: StudySettings, outcome: str
) -> dict[str, Any]:
    """All measures of a cell's model; those beside a parent only where it moved."""
    data = folders.data(cell.seed)
    own = _own(cell, cells, folders, outcome)
    runtime = start(ParallelConfig(), seed=0)
    try:
        model = build_model(read_architecture(own), runtime).requires_grad_(False)
        load(own, model)
        model.eval()
        tasks, answers = behaviour.answer(model, data, settings.questions, settings.max_new_tokens)
        general, tokens = behaviour.remember(model, data, settings.held_out_rows, settings.seq_length)
        items = {"answers": answers, "general": tokens}
        found: dict[str, Any] = {"tasks": tasks, "general": general, "weights_sha256": _digest(model)}
        for name in dict.fromkeys(("base", cell.parent)):
            before = folders.read(cells[name], "items") if name and name != cell.name else None
            if before is not None:
                found.setdefault("forgotten", {})[name] = behaviour.forgotten(before, items)
        if cell.parent and outcome == "trained":
            parent = training.checkpoint_of(cells[cell.parent], cells, folders)
            if parent is None:
                raise PrismError(f"{cell.key}: the model of {cell.parent} is gone; run the study again")
            schedule = training.stage_schedule(cell, folders)
            found["weights"], distances = insides.weight_change(parent, own, schedule)
            found["path"] = insides.way_between(model, parent, own, data, settings)
            found["cka"] = insides.representations(model, parent, own, distances, data, settings)
    finally:
        stop()
    folders.write(cell, "items", items)
    return found


def _own(cell: Cell, cells: dict[str, Cell], folders: Folders, outcome: str) -> Path:
    stands_for = cells[cell.parent] if outcome == "no prompts" else cell
    found = training.checkpoint_of(stands_for, cells, folders)
    if found is None:
        raise PrismError(f"{cell.key}: its checkpoint was not written to {folders.run(cell)}")
    return found


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights_sha256(cell: Cell, cells: dict[str, Cell], folders: Folders) -> str:
    own = training.checkpoint_of(cell, cells, folders)
    if own is None:
        return ""
    runtime = start(ParallelConfig(), seed=0)
    try:
        model = build_model(read_architecture(own), runtime)
        load(own, model)
        return _digest(model)
    finally:
        stop()


def _updates(cells: dict[str, Cell], folders: Folders) -> dict[str, Any]:
    """Cosine and overlap of every two of the compared updates that there are."""
    models: dict[str, Path] = {}
    moves = []
    for name in COMPARED:
        measured = folders.read(cells[name])
        own, parent = (training.checkpoint_of(cells[n], cells, folders) for n in (name, cells[name].parent))
        if measured is None or measured["outcome"] != "trained" or own is None or parent is None:
            continue
        models[name], models[cells[name].parent] = own, parent
        moves.append(name)
    order = list(models)
    transitions = [(order.index(cells[name].parent), order.index(name)) for name in moves]
    start(ParallelConfig(), seed=0)  # once, and not in a process for each of the models
    try:
        _, overlaps = compare_checkpoints([models[name] for name in order], transitions, threads=1)
    finally:
        stop()
    pairs = []
    for (one, two), found in overlaps.items():
        total = found.total.to_dict()
        pairs.append({"one": moves[one], "two": moves[two], **total})
    return {"pairs": pairs, "missing": [name for name in COMPARED if name not in moves]}
