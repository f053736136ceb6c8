"""What was measured, as small tables that are kept in the repository: one row for each number."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.errors import InputError
from prism_nemo.study.folders import Folders
from prism_nemo.study.plan import Cell

MEASURES, UPDATES, LINEAGE = "pocket_study_cells.csv", "pocket_study_updates.csv", "pocket_study_lineage.json"
_COLUMNS = ("family", "seed", "cell", "measure", "name", "value", "low", "high", "n")
_PAIR = ("family", "seed", "one", "two", "cosine", "same_sign", "jaccard_1", "by_size_of_weight_1")


@dataclass
class Table:
    """The numbers of a study, to be asked for.

    Attributes:
        rows: With the keys of the file of measures; `value`, `low`, `high` are numbers or None.
        pairs: With those of the file of updates.
        lineage: Settings, versions, machines, cost, and the digest of each cell's measures.
    """

    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    lineage: dict[str, Any]
    _index: dict[tuple[str, int, str, str, str], dict[str, Any]] = field(default_factory=dict, init=False, repr=False)
    _pairs: dict[tuple[str, int, frozenset[str]], dict[str, Any]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for row in self.rows:
            self._index[row["family"], row["seed"], row["cell"], row["measure"], row["name"]] = row
        for row in self.pairs:
            self._pairs[row["family"], row["seed"], frozenset((row["one"], row["two"]))] = row

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(family, seed) of all rows, in their order."""
        return list(dict.fromkeys((row["family"], row["seed"]) for row in self.rows))

    @property
    def families(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(family for family, _ in self.groups))

    def value(self, family: str, seed: int, cell: str, measure: str, name: str = "") -> float | None:
        """One number; None where it was not measured."""
        row = self._index.get((family, seed, cell, measure, name))
        return None if row is None else row["value"]

    def pair(self, family: str, seed: int, one: str, two: str, measure: str) -> float | None:
        """A measure of two updates, in either order."""
        row = self._pairs.get((family, seed, frozenset((one, two))))
        return None if row is None or row[measure] is None else float(row[measure])


def collect(folders: Folders, cells: Sequence[Cell]) -> Table:
    """The table of all cells that are done.

    Raises:
        InputError: If none is.
    """
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    digests = {}
    for cell in cells:
        measures = folders.read(cell)
        if measures is None:
            continue
        digests[cell.key] = hashlib.sha256((folders.results(cell) / "measures.json").read_bytes()).hexdigest()
        where = {"family": cell.family, "seed": cell.seed}
        for pair in measures.get("pairs", ()):
            values = {key: pair[key] for key in ("one", "two", "cosine", "same_sign")}
            at_one = {"jaccard_1": pair["jaccard"]["1"], "by_size_of_weight_1": pair["by_size_of_weight"]["1"]}
            pairs.append({**where, **values, **at_one})
        for measure, name, value, low, high, n in _numbers(measures):
            numbers = {"value": value, "low": low, "high": high, "n": n}
            rows.append({**where, "cell": cell.name, "measure": measure, "name": name, **numbers})
    if not rows:
        raise InputError(f"{folders.out}: no cell of this study is done there")
    record = folders.out / "settings.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    lineage = {
        **known,
        "cells_done": len(digests),
        "cells_planned": len(cells),
        "cost": _cost(folders, cells),
        "measures_sha256": digests,
    }
    return Table(rows, pairs, lineage)


def _cost(folders: Folders, cells: Sequence[Cell]) -> dict[str, float]:
    """Seconds of all cells that are done, one process each: by the clock, and of processor time.

    Data, and models that were made again after a stop, are not in it.
    """
    spent = [timing for timing in (folders.read(cell, "timing") for cell in cells) if timing is not None]
    return {name: round(sum(timing[name] for timing in spent)) for name in ("seconds", "cpu_seconds")}


Number = tuple[str, str, float | None, float | None, float | None, int | None]


def _numbers(measures: dict[str, Any]) -> list[Number]:
    """(measure, name, value, low, high, n) of a cell."""
    found: list[Number] = [("outcome", measures["outcome"], 1.0, None, None, None)]
    tasks = measures.get("tasks", {})
    if measures["outcome"] == "filtered":
        for task, of in tasks.items():
            found.append(("prompts_kept", task, of["kept"], None, None, of["measured"]))
            found.append(("prompt_pass_rate", task, of["pass_rate"], None, None, of["measured"]))
        return found
    for task, of in tasks.items():
        found.append(("accuracy", task, of["accuracy"], of["low"], of["high"], of["n"]))
        for name in ("free_accuracy", "format_rate", "response_tokens", "entropy"):
            found.append((name, task, of[name], None, None, of["n"]))
    if "general" in measures:
        of = measures["general"]
        found.append(("general_loss", "", of["loss"], of["low"], of["high"], of["tokens"]))
        found.append(("general_top1", "", of["top1"], None, None, of["tokens"]))
    for before, parts in measures.get("forgotten", {}).items():
        for part, of in parts.items():
            for name in ("forgotten", "learned"):
                found.append((f"{name}_since_{before}", part, of[name], None, None, of["right_before"]))
    if "weights" in measures:
        found += _weights(measures["weights"])
    for kind, layers in measures.get("cka", {}).items():
        found += [(f"cka_{kind}", f"{place:02d}", value, None, None, None) for place, value in enumerate(layers)]
        found.append((f"cka_{kind}_min", "", min(layers), None, None, None))
    for point in measures.get("path", ()):
        found.append(("path_loss", f"{point['alpha']:.2f}", point["loss"], point["low"], point["high"], None))
        for task, value in point.get("accuracy", {}).items():
            found.append((f"path_accuracy_{task}", f"{point['alpha']:.2f}", value, None, None, None))
    return found


def _weights(weights: dict[str, Any]) -> list[Number]:
    found: list[Number] = []
    for name, of in {"observed": weights["total"], **weights["nulls"]}.items():
        for threshold, share in of["thresholds"].items():
            found.append((f"changed_{threshold}_percent", name, share, None, None, None))
        found.append(("relative_l2", name, of["relative_l2"], None, None, None))
        found.append(("sign_flips", name, of["sign_flip_fraction"], None, None, None))
    for part, of in weights["by_component"].items():
        found.append(("component_changed_1_percent", part, of["thresholds"]["1"], None, None, of["parameters"]))
        found.append(("component_relative_l2", part, of["relative_l2"], None, None, of["parameters"]))
    return found


def write(table: Table, folder: Path) -> list[Path]:
    """Keep a table as two CSV files and one of JSON; numbers are written so that reading gives them back."""
    paths = []
    for name, columns, rows in ((MEASURES, _COLUMNS, table.rows), (UPDATES, _PAIR, table.pairs)):
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        paths.append(_kept(folder / name, text.getvalue()))
    paths.append(_kept(folder / LINEAGE, json.dumps(table.lineage, indent=1, sort_keys=True) + "\n"))
    return paths


def _kept(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def read(folder: Path) -> Table:
    """A table that `write` wrote.

    Raises:
        InputError: If a file is missing or has other columns.
    """
    for name in (MEASURES, UPDATES, LINEAGE):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; run `prism-nemo study` first")
    tables = []
    for name, columns in ((MEASURES, _COLUMNS), (UPDATES, _PAIR)):
        with (folder / name).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != columns:
                raise InputError(f"{folder / name}: expected the columns {', '.join(columns)}")
            tables.append([{key: _parsed(key, value) for key, value in row.items()} for row in reader])
    return Table(tables[0], tables[1], json.loads((folder / LINEAGE).read_text()))


def _parsed(column: str, text: str) -> Any:
    if column in ("family", "cell", "measure", "name", "one", "two"):
        return text
    if text == "":
        return None
    return int(text) if column in ("seed", "n") else float(text)
