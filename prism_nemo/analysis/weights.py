"""How far checkpoints of one model are apart: the share of changed parameters, distances, and overlap of updates.

The measures follow the PRISM study (arXiv 2603.17074): Eq. 1 for the relative distance and Tables 12, 22 and 23 for the
share of individual parameters whose relative change exceeds a threshold. Its "sparsity" is one minus that share. The
study compares updates by these numbers alone; here are also their direction (cosine) and their place (overlap).

Read the shares with care. They are set by learning rate x steps as much as by the data, because the weights that pass a
relative threshold first are simply the smallest ones; and a checkpoint stored in bf16 cannot express a relative change
below 0.39-0.78 % (its spacing), so the shares at 0.1 % and 0.5 % then both come close to "changed at all".
`prism_nemo.analysis.nulls` says what is to be expected of learning rate, steps and rounding alone.

Everything is counted in one pass over the files, a few megabytes at a time, on all cores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from prism_nemo.analysis.change import Overlap, WeightChange, change_of, overlap_of
from prism_nemo.analysis.passes import THRESHOLDS_PERCENT
from prism_nemo.analysis.sources import DTYPES, Weights, open_weights
from prism_nemo.analysis.tally import JointTally, Tally, Workspace, stretches, tally_rows
from prism_nemo.analysis.tensor_names import HEAD, component_of, layer_of
from prism_nemo.errors import InputError

__all__ = ["THRESHOLDS_PERCENT", "WeightChange", "WeightComparison", "compare_checkpoints", "compare_weights"]

_BLOCK = 1 << 18  # weights of a checkpoint that a thread holds at once: 1.6 MB in bf16 and fp32
_LISTED = 8  # tensors that a message names
_STRETCH = 1 << 22  # weights of a task

Progress = Callable[[int, int], None]  # weights done, weights in all


@dataclass(frozen=True)
class WeightComparison:
    """Change between two checkpoints, in total and by part.

    Attributes:
        total: over all parameters. Its `relative_l2` is the norm over everything, not an average of the parts.
        by_component: by coarse group (`component_of`).
        by_subcomponent: by component, such as "attention.q" or "mamba.conv1d".
        by_layer: by layer index, in order; embedding, head and final norm belong to no layer.
        tensors: by tensor name.
        skipped: tensors that were left out: a copy of a tied embedding, rotary buffers, empty tensors.
        stored_dtypes: the types on disk of the "before" and the "after" checkpoint.
        tallies: what the measures were made from, by tensor name.
    """

    total: WeightChange
    by_component: dict[str, WeightChange]
    by_subcomponent: dict[str, WeightChange]
    by_layer: dict[str, WeightChange]
    tensors: dict[str, WeightChange]
    skipped: tuple[str, ...]
    stored_dtypes: dict[str, list[str]]
    tallies: dict[str, Tally] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the measures of the total on the top level, beside the parts."""
        parts = ("by_component", "by_subcomponent", "by_layer", "tensors")
        return {
            **self.total.to_dict(),
            **{part: {key: change.to_dict() for key, change in getattr(self, part).items()} for part in parts},
            "skipped": list(self.skipped),
            "stored_dtypes": {key: list(value) for key, value in self.stored_dtypes.items()},
        }


@dataclass(frozen=True)
class UpdateComparison:
    """Two updates of the same parameters compared, in total and by part; see `WeightComparison` for the parts."""

    total: Overlap
    by_component: dict[str, Overlap]
    by_subcomponent: dict[str, Overlap]
    by_layer: dict[str, Overlap]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        parts = ("by_component", "by_subcomponent", "by_layer")
        return {
            **self.total.to_dict(),
            **{part: {key: found.to_dict() for key, found in getattr(self, part).items()} for part in parts},
        }


def _comparable(checkpoints: Sequence[Weights]) -> tuple[list[str], list[str]]:
    """Names to compare and names to skip, checked on the headers alone, before any weight is read."""
    before = checkpoints[0]
    every = set().union(*(weights.names() for weights in checkpoints))
    skipped = {name for name in every if name.endswith("rotary_emb.inv_freq")}
    # A tied head is the embedding; files that store the copy as well would count those parameters twice.
    if HEAD in every and all(weights.head_is_tied() for weights in checkpoints):
        skipped.add(HEAD)
    for after in checkpoints[1:]:
        first, second = before.names() - skipped, after.names() - skipped
        if first != second:
            raise InputError(_unlike(before, after, first, second))
    for name in sorted(before.names() - skipped):
        for weights in checkpoints:
            shapes = before.shape(name), weights.shape(name)
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"{weights.folder}: tensor {name} has shape {shapes[1]}, but {shapes[0]} in {before.folder}; "
                    "compare two checkpoints of one architecture and one vocabulary"
                )
            if weights.dtype(name) not in DTYPES:
                raise InputError(
                    f"{weights.folder}: tensor {name} is stored as {weights.dtype(name)}; only {', '.join(DTYPES)} can "
                    "be compared (convert a quantised checkpoint back first)"
                )
        if 0 in shapes[0] or not shapes[0]:
            skipped.add(name)
    return sorted(before.names() - skipped), sorted(skipped)


def _unlike(before: Weights, after: Weights, first: set[str], second: set[str]) -> str:
    """Which tensors only one of two checkpoints has, a few of them by name."""
    said = []
    for holder, lacking, names in ((before, after, first - second), (after, before, second - first)):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
            what = "tensor" if len(listed) == 1 else "tensors"
            said.append(
                f"{lacking.folder}: {what} {', '.join(listed[:_LISTED])}{more} is missing, but {holder.folder} holds it"
            )
    head = HEAD in first ^ second
    why = "one model ties its embeddings, the other does not" if head else "are these one architecture?"
    return f"{'; '.join(said)}; {why}"


def compare_checkpoints(
    folders: Sequence[Path],
    transitions: Sequence[tuple[int, int]],
    progress: Progress | None = None,
    threads: int | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[WeightComparison], dict[tuple[int, int], UpdateComparison]]:
    """Compare checkpoints of one architecture, parameter by parameter, all of them in one pass.

    Args:
        folders: Hugging Face folders or native checkpoints.
        transitions: (before, after), as indices of folders; relative changes are relative to `before`.
        progress: Told how many weights are done.
        threads: Of the pass; as many as there are cores if not given.
        pairs: Which transitions are compared with each other, as indices; all of them if not given.

    Returns:
        For each transition its measures, and for each pair of transitions (as indices) how their updates lie to each
        other.

    Raises:
        InputError: A folder or file is missing or unreadable; the tensors or their shapes differ; a tensor is not of
            floating point, or holds NaN or Inf; a reference holds nothing but zeros.
    """
    moves = list(transitions)
    pairs = list(combinations(range(len(moves)), 2)) if pairs is None else list(pairs)
    with ExitStack() as stack:
        checkpoints = [open_weights(Path(folder), stack) for folder in folders]
        names, skipped = _comparable(checkpoints)
        sizes = {name: checkpoints[0].shape(name) for name in names}
        tasks = [
            (name, first, rows)
            for name in names
            for first, rows in stretches(sizes[name][0], math.prod(sizes[name][1:]), _STRETCH)
        ]
        total = sum(math.prod(size) for size in sizes.values())
        space = Workspace()

        def work(task: tuple[str, int, int]) -> tuple[list[Tally], list[JointTally]]:
            return tally_rows(space, checkpoints, moves, pairs, *task, _BLOCK)

        found: dict[str, list[Tally]] = {}
        joint = [_JointGroups() for _ in pairs]
        parts: list[list[Tally]] = []
        done = 0
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            for (name, first, rows), (singles, both) in zip(tasks, pool.map(work, tasks), strict=True):
                parts.append(singles)
                if first + rows == sizes[name][0]:  # the tensor is complete
                    found[name] = [Tally.sum(part[t] for part in parts) for t in range(len(moves))]
                    parts = []
                for groups, tally in zip(joint, both, strict=True):
                    groups.add(name, tally)
                done += rows * math.prod(sizes[name][1:])
                if progress is not None:
                    progress(done, total)
        by_move = [{name: found[name][t] for name in names} for t in range(len(moves))]
        for (before, after), tallies in zip(moves, by_move, strict=True):
            _check_finite(checkpoints[before], checkpoints[after], tallies)
        dtypes = [sorted({weights.dtype(name) for name in names}) for weights in checkpoints]
    comparisons = []
    for (before, after), tallies in zip(moves, by_move, strict=True):
        if not any(tally.before for tally in tallies.values()):
            raise InputError(
                f"{folders[before]}: every weight is zero or there is none, so no change relative to it is defined"
            )
        comparisons.append(_compared(tallies, skipped, {"before": dtypes[before], "after": dtypes[after]}))
    overlaps = {
        pair: groups.compared(by_move[pair[0]], by_move[pair[1]]) for pair, groups in zip(pairs, joint, strict=True)
    }
    return comparisons, overlaps


def compare_weights(before: Path, after: Path) -> WeightComparison:
    """Compare two checkpoints of one architecture; see `compare_checkpoints`.

    Returns:
        The measures in total, by component, by layer and by tensor. A tied head counts once, under the embedding,
        whether or not a file stores a copy of it.
    """
    return compare_checkpoints([before, after], [(0, 1)])[0][0]


def _check_finite(before: Weights, after: Weights, tallies: dict[str, Tally]) -> None:
    """Both sums are finite only if every value is: this finds NaN and Inf without another pass over the data."""
    for name, tally in tallies.items():
        if not (np.isfinite(tally.before) and np.isfinite(tally.change)):
            folder = after if np.isfinite(tally.before) else before
            raise InputError(
                f"{folder.folder}: tensor {name} holds NaN, Inf or values beyond float64 squares; the run that wrote "
                "it diverged or the file is damaged, use an earlier checkpoint"
            )


def _groups(names: Sequence[str], key: Callable[[str], str | None]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        group = key(name)
        if group is not None:
            groups.setdefault(group, []).append(name)
    # Numbers in numeric order, so that layer 10 follows layer 9.
    order = sorted(groups, key=lambda group: (int(group) if group.isdigit() else -1, group))
    return {group: groups[group] for group in order}


_PARTS: dict[str, Callable[[str], str | None]] = {
    "by_component": lambda name: component_of(name)[0],
    "by_subcomponent": lambda name: component_of(name)[1],
    "by_layer": layer_of,
}


def _compared(tallies: dict[str, Tally], skipped: list[str], dtypes: dict[str, list[str]]) -> WeightComparison:
    parts = {
        part: {
            group: change_of(Tally.sum(tallies[name] for name in members))
            for group, members in _groups(list(tallies), key).items()
        }
        for part, key in _PARTS.items()
    }
    return WeightComparison(
        total=change_of(Tally.sum(tallies.values())),
        **parts,
        tensors={name: change_of(tally) for name, tally in tallies.items()},
        skipped=tuple(skipped),
        stored_dtypes=dtypes,
        tallies=tallies,
    )


class _JointGroups:
    """What is counted of two updates together, by group: kept so, and not by tensor, to need little memory."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str], JointTally] = {}

    def add(self, name: str, tally: JointTally) -> None:
        """A stretch of a tensor."""
        for part, key in (("total", _everything), *_PARTS.items()):
            group = key(name)
            if group is not None:
                self._tallies.setdefault((part, group), JointTally()).add(tally)

    def compared(self, one: dict[str, Tally], two: dict[str, Tally]) -> UpdateComparison:
        """The measures, given what was counted of each update by tensor."""

        def of(part: str, group: str, members: Sequence[str]) -> Overlap:
            first, second = (Tally.sum(tallies[name] for name in members) for tallies in (one, two))
            return overlap_of(self._tallies[part, group], first, second)

        names = list(one)
        parts = {
            part: {group: of(part, group, members) for group, members in _groups(names, key).items()}
            for part, key in _PARTS.items()
        }
        return UpdateComparison(total=of("total", _everything(names[0]), names), **parts)


def _everything(_: str) -> str:
    return ""
