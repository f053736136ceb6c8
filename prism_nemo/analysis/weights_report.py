"""`analyze weights`: checkpoints in a row, what each step between them changed, and what null models would give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from prism_nemo.analysis.change import KEYS, WeightChange
from prism_nemo.analysis.lineage import schedule_of, stage_between
from prism_nemo.analysis.nulls import Null, Schedule, nulls_of
from prism_nemo.analysis.sources import load, open_weights
from prism_nemo.analysis.spectrum import Spectrum, spectrum_of
from prism_nemo.analysis.tables import write_tables
from prism_nemo.analysis.tally import Tally
from prism_nemo.analysis.tensor_names import component_of
from prism_nemo.analysis.weights import Progress, UpdateComparison, WeightComparison, compare_checkpoints
from prism_nemo.errors import InputError
from prism_nemo.run import checkpoint_name

_FEW = 6  # transitions up to which each is compared with every other
_MEASURES = ("relative_l2", "equal_fraction", "bf16_equal_fraction", "update_norm", "weight_norm", "drift")


@dataclass
class WeightsSettings:
    """What to compare.

    Attributes:
        checkpoints: At least two, in the order of training: Hugging Face folders or native checkpoints.
        transitions: Further (before, after) beside those from each to the next and from the first to each; for instance
            base to base-RL beside base, mid-trained, PRISM-RL.
        runs: Directories of the stages between consecutive checkpoints, for the null models: one for each, "-" for
            none. Those of native checkpoints are found if not given.
        spectrum: Whether to compute singular values of the updates (minutes for a large model).
    """

    checkpoints: list[Path]
    transitions: list[tuple[Path, Path]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    spectrum: bool = False


@dataclass
class Transition:
    """One step from a checkpoint to another.

    Attributes:
        before: Folder.
        after: Folder.
        comparison: What changed.
        nulls: For the whole (key "total") and each component.
        schedule: Of the stages between, or None.
        spectra: By tensor; empty if not asked for.
    """

    before: Path
    after: Path
    comparison: WeightComparison
    nulls: dict[str, list[Null]]
    schedule: Schedule | None
    spectra: dict[str, Spectrum | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return f"{checkpoint_name(self.before)} -> {checkpoint_name(self.after)}"


@dataclass
class WeightsReport:
    """What `analyze weights` found."""

    transitions: list[Transition]
    overlaps: dict[tuple[int, int], UpdateComparison]
    trajectory: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "transitions": [
                {
                    "before": str(t.before),
                    "after": str(t.after),
                    **t.comparison.to_dict(),
                    "nulls": {part: [null.to_dict() for null in found] for part, found in t.nulls.items()},
                    "schedule": None if t.schedule is None else vars(t.schedule),
                    "spectra": {n: None if s is None else s.to_dict() for n, s in t.spectra.items()},
                }
                for t in self.transitions
            ],
            "overlaps": [
                {"first": self.transitions[a].name, "second": self.transitions[b].name, **found.to_dict()}
                for (a, b), found in self.overlaps.items()
            ],
            "trajectory": self.trajectory,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Tidy: one line for each value of each measure of each part."""
        for t in self.transitions:
            for scope, part, change in _parts(t.comparison):
                about = {"transition": t.name, "scope": scope, "part": part}
                for measure, value in _values(change):
                    yield {**about, "measure": measure, "null": None, "value": value}
                for null in t.nulls.get("total" if scope == "total" else part if scope == "component" else "", []):
                    for measure, value in _null_values(null):
                        yield {**about, "measure": measure, "null": null.name, "value": value}
        for (a, b), found in self.overlaps.items():
            about = {"transition": f"{self.transitions[a].name} | {self.transitions[b].name}"}
            for scope, table in (("total", {"": found.total}), ("component", found.by_subcomponent)):
                for part, overlap in table.items():
                    for measure, value in (("cosine", overlap.cosine), ("same_sign", overlap.same_sign)):
                        yield {**about, "scope": scope, "part": part, "measure": measure, "null": None, "value": value}
                    for chance, values in (
                        (None, overlap.jaccard),
                        ("by_chance", overlap.by_chance),
                        ("by_size_of_weight", overlap.by_size_of_weight),
                    ):
                        for key, value in values.items():
                            yield {
                                **about, "scope": scope, "part": part, "measure": f"jaccard_{key}pct", "null": chance,
                                "value": value,
                            }  # fmt: skip

    def write(self, out: Path) -> list[Path]:
        """Write OUT/weights.json, weights.jsonl (tidy), weights.html (figures) and, with pyarrow, weights.parquet."""
        from prism_nemo.analysis.weights_figures import weights_figures
        from prism_nemo.report.standalone import write_figures

        written = write_tables(out, "weights", self.to_dict(), self.rows())
        names = ", ".join(t.name for t in self.transitions[:3])
        write_figures(out / "weights.html", "What changed in the weights", names, weights_figures(self))
        return [*written, out / "weights.html"]


def transition_of(text: str) -> tuple[Path, Path]:
    """FROM:TO as two folders; the colon where both sides exist, as folders may have one in their names.

    Raises:
        InputError: If there is no such colon.
    """
    cuts = [i for i, letter in enumerate(text) if letter == ":"]
    found = [(Path(text[:i]), Path(text[i + 1 :])) for i in cuts]
    existing = [pair for pair in found if pair[0].exists() and pair[1].exists()]
    if len(existing) != 1:
        raise InputError(f"--transition '{text}': expected FROM:TO, two checkpoints that exist")
    return existing[0]


def analyze_weights(settings: WeightsSettings, progress: Progress | None = None) -> WeightsReport:
    """Compare checkpoints in a row.

    Raises:
        InputError: For fewer than two checkpoints, a wrong number of runs, or what `compare_checkpoints` refuses.
    """
    given = [Path(folder) for folder in settings.checkpoints]
    if len(given) < 2:
        raise InputError("analyze weights: give at least two checkpoints, the earlier one first")
    if settings.runs and len(settings.runs) != len(given) - 1:
        raise InputError(
            f"--run: {len(settings.runs)} given for {len(given) - 1} steps between checkpoints; give one for each, in "
            "their order, or '-' where there is none"
        )
    folders = list(dict.fromkeys([*given, *(folder for pair in settings.transitions for folder in pair)]))
    if len(folders) < 2:
        raise InputError(f"{given[0]}: the same checkpoint is given twice")
    stages = _stages(given, settings.runs)
    moves = [(i, i + 1) for i in range(len(given) - 1)]
    moves += [(0, i) for i in range(2, len(given))]
    moves = [(folders.index(given[a]), folders.index(given[b])) for a, b in moves]
    moves += [(folders.index(a), folders.index(b)) for a, b in settings.transitions]
    moves = list(dict.fromkeys(move for move in moves if move[0] != move[1]))
    few = len(moves) <= _FEW
    pairs = list(combinations(range(len(moves)), 2)) if few else [(i, i + 1) for i in range(len(given) - 2)]
    comparisons, overlaps = compare_checkpoints(folders, moves, progress, pairs=pairs)
    transitions = []
    for (a, b), comparison in zip(moves, comparisons, strict=True):
        schedule = _between(folders[a], folders[b], given, stages)
        transitions.append(Transition(folders[a], folders[b], comparison, _nulls(comparison, schedule), schedule))
    if settings.spectrum:
        for transition in transitions:
            transition.spectra = spectra(transition.before, transition.after, list(transition.comparison.tensors))
    return WeightsReport(transitions, overlaps, _trajectory(transitions, given))


def spectra(before: Path, after: Path, names: list[str]) -> dict[str, Spectrum | None]:
    """Of the update of each matrix, one at a time; None where a matrix did not change."""
    found = {}
    with ExitStack() as stack:
        a, b = open_weights(before, stack), open_weights(after, stack)
        for name in names:
            shape = a.shape(name)
            if len(shape) == 2 and min(shape) > 1:
                found[name] = spectrum_of(load(b, name).float() - load(a, name).float())
    return found


def _stages(given: list[Path], runs: list[str]) -> list[Schedule | None]:
    """Of each step from a checkpoint to the next."""
    if not runs:
        return [stage_between(a, b) for a, b in pairwise(given)]
    return [None if run == "-" else schedule_of(Path(run)) for run in runs]


def _between(before: Path, after: Path, given: list[Path], stages: list[Schedule | None]) -> Schedule | None:
    """Of all stages from one checkpoint to a later one; None if one of them is not known."""
    if before not in given or after not in given or given.index(before) >= given.index(after):
        return stage_between(before, after)
    total: Schedule | None = None
    for stage in stages[given.index(before) : given.index(after)]:
        if stage is None:
            return None
        total = stage if total is None else total.then(stage)
    return total


def _nulls(comparison: WeightComparison, schedule: Schedule | None) -> dict[str, list[Null]]:
    bf16 = comparison.stored_dtypes["after"] == ["BF16"]
    groups: dict[str, list[Tally]] = {"total": list(comparison.tallies.values())}
    for name, tally in comparison.tallies.items():
        groups.setdefault(component_of(name)[1], []).append(tally)
    # Norms, biases and Mamba's vectors are not decayed: for them, and for the whole with them, no decay is given.
    found = {}
    for group, tallies in groups.items():
        decayed = group not in ("total", "norm", "mamba.a_dt", "mamba.d")
        found[group] = nulls_of(Tally.sum(tallies), bf16, schedule, decayed)
    matrices = [t for name, t in comparison.tallies.items() if component_of(name)[0] not in ("norm",)]
    if schedule is not None and matrices:
        found["total"] = [*nulls_of(Tally.sum(matrices), bf16, schedule)[:1], *found["total"]]
    return found


def _trajectory(transitions: list[Transition], given: list[Path]) -> list[dict[str, Any]]:
    """How far each checkpoint is from the first one, as a share of the last one's distance: front-loading."""
    from_first = {t.after: t.comparison.total for t in transitions if t.before == given[0]}
    last = from_first.get(given[-1])
    rows = []
    for folder in given[1:]:
        total = from_first.get(folder)
        if total is None:
            continue
        reached = total.update_norm / last.update_norm if last is not None and last.update_norm else None
        rows.append(
            {
                "checkpoint": str(folder),
                "relative_l2": total.relative_l2,
                "share_of_final_distance": reached,
                "changed_fraction_1pct": total.changed_fraction_1pct,
            }
        )
    return rows


def _parts(comparison: WeightComparison) -> Iterator[tuple[str, str, WeightChange]]:
    yield "total", "", comparison.total
    for scope, table in (
        ("group", comparison.by_component),
        ("component", comparison.by_subcomponent),
        ("layer", comparison.by_layer),
        ("tensor", comparison.tensors),
    ):
        for part, change in table.items():
            yield scope, part, change


def _values(change: WeightChange) -> Iterator[tuple[str, float | None]]:
    for key in KEYS:
        yield f"changed_{key}pct", change.thresholds[key]
    for name in _MEASURES:
        yield name, getattr(change, name)
    yield "sign_flip_fraction", change.sign_flip_fraction
    for i, share in enumerate(change.deciles, 1):
        yield f"changed_1pct_decile_{i}", share


def _null_values(null: Null) -> Iterator[tuple[str, float | None]]:
    for key in KEYS:
        yield f"changed_{key}pct", null.thresholds[key]
    for name in ("relative_l2", "equal_fraction", "bf16_equal_fraction", "sign_flip_fraction", "drift"):
        yield name, getattr(null, name)
    for i, share in enumerate(null.deciles, 1):
        yield f"changed_1pct_decile_{i}", share
