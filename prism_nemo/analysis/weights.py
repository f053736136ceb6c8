"""How far two checkpoints of one model are apart: the share of changed parameters and the relative L2 distance.

The measures follow the PRISM study (arXiv 2603.17074): Eq. 1 for the relative distance and Tables 12, 22 and 23 for the
share of individual parameters whose relative change exceeds a threshold. Its "sparsity" is one minus that share.

Read the shares with care. They are set by learning rate x steps as much as by the data, because the weights that pass a
relative threshold first are simply the smallest ones; and a checkpoint stored in bf16 cannot express a relative change
below 0.39-0.78 % (its spacing), so the shares at 0.1 % and 0.5 % then both come close to "changed at all".

Not covered: overlap or cosine of two updates (needs three checkpoints), quantised checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_nemo.analysis.hf_tensors import HEAD, TensorFolder, component_of, layer_of
from prism_nemo.errors import InputError

THRESHOLDS_PERCENT: tuple[float, ...] = (0.1, 0.5, 1, 2, 5, 10)
_FLOATS = ("F64", "F32", "F16", "BF16")
_BLOCK = 1 << 18  # elements held in float64 at once: 2 MiB a copy, which stays in cache


@dataclass(frozen=True)
class WeightChange:
    """Change of one set of parameters (a tensor, a component, a layer or everything).

    Attributes:
        parameters: number of parameters compared.
        thresholds: for each threshold t in percent (keys "0.1", "0.5", "1", "2", "5", "10") the share, 0 to 1, of
            parameters with |b - a| > t/100 * |a|. Where a == 0 this reads |b| > 0: any non-zero b counts as changed at
            every threshold, and a zero that stayed zero never does.
        equal_fraction: share with b == a by value, so -0.0 equals 0.0.
        bf16_equal_fraction: share with b == a after rounding both to bf16: what inference in bf16 cannot tell apart.
        relative_l2: ||b - a|| / ||a|| (Eq. 1, Frobenius norm); None where a is all zeros and b is not (undefined), 0.0
            where both are.
    """

    parameters: int
    thresholds: dict[str, float]
    equal_fraction: float
    bf16_equal_fraction: float
    relative_l2: float | None

    @property
    def changed_fraction_1pct(self) -> float:
        """Share of parameters, 0 to 1, whose relative change is above 1 %: the measure of Table 23."""
        return self.thresholds["1"]

    def to_dict(self) -> dict[str, Any]:
        """The measures as plain JSON values."""
        return {
            "parameters": self.parameters,
            "changed_fraction_1pct": self.changed_fraction_1pct,
            "relative_l2": self.relative_l2,
            "thresholds": dict(self.thresholds),
            "equal_fraction": self.equal_fraction,
            "bf16_equal_fraction": self.bf16_equal_fraction,
        }


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
    """

    total: WeightChange
    by_component: dict[str, WeightChange]
    by_subcomponent: dict[str, WeightChange]
    by_layer: dict[str, WeightChange]
    tensors: dict[str, WeightChange]
    skipped: tuple[str, ...]
    stored_dtypes: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the measures of the total on the top level, beside the parts."""
        parts = ("by_component", "by_subcomponent", "by_layer", "tensors")
        return {
            **self.total.to_dict(),
            **{part: {key: change.to_dict() for key, change in getattr(self, part).items()} for part in parts},
            "skipped": list(self.skipped),
            "stored_dtypes": {key: list(value) for key, value in self.stored_dtypes.items()},
        }


@dataclass
class _Tally:
    """Counts and float64 sums of squares that add up over blocks and tensors."""

    parameters: int = 0
    changed: list[int] = field(default_factory=lambda: [0] * len(THRESHOLDS_PERCENT))
    equal: int = 0
    bf16_equal: int = 0
    square_before: float = 0.0
    square_change: float = 0.0

    def add_block(self, a: Tensor, b: Tensor) -> None:
        """Count one block; a and b are flat, of one length, in their stored types."""
        before = a.double()
        change = (b.double() - before).abs_()
        self.square_before += float(before.square().sum())
        self.square_change += float(change.square().sum())
        size = before.abs_()
        self.parameters += a.numel()
        self.equal += a.numel() - int(torch.count_nonzero(change))
        self.bf16_equal += int(torch.count_nonzero(a.bfloat16() == b.bfloat16()))
        for i, percent in enumerate(THRESHOLDS_PERCENT):
            self.changed[i] += int(torch.count_nonzero(change > size * (percent / 100)))

    def add(self, other: _Tally) -> None:
        self.parameters += other.parameters
        self.changed = [x + y for x, y in zip(self.changed, other.changed, strict=True)]
        self.equal += other.equal
        self.bf16_equal += other.bf16_equal
        self.square_before += other.square_before
        self.square_change += other.square_change

    def measure(self) -> WeightChange:
        if self.square_before > 0:
            relative: float | None = math.sqrt(self.square_change / self.square_before)
        else:
            relative = None if self.square_change > 0 else 0.0
        shares = [count / self.parameters for count in self.changed]
        return WeightChange(
            parameters=self.parameters,
            thresholds={f"{percent:g}": share for percent, share in zip(THRESHOLDS_PERCENT, shares, strict=True)},
            equal_fraction=self.equal / self.parameters,
            bf16_equal_fraction=self.bf16_equal / self.parameters,
            relative_l2=relative,
        )


def _comparable(before: TensorFolder, after: TensorFolder) -> tuple[list[str], list[str]]:
    """Names to compare and names to skip, checked on the headers alone, before any weight is read."""
    skipped = {name for name in before.names() | after.names() if name.endswith("rotary_emb.inv_freq")}
    # A tied head is the embedding; files that store the copy as well would count those parameters twice.
    if HEAD in before.names() | after.names() and before.head_is_tied() and after.head_is_tied():
        skipped.add(HEAD)
    first, second = before.names() - skipped, after.names() - skipped
    for name in sorted(first ^ second):
        holder, lacking = (before, after) if name in first else (after, before)
        hint = "one model ties its embeddings, the other does not" if name == HEAD else "are these one architecture?"
        raise InputError(f"{lacking.folder}: tensor {name} is missing, but {holder.folder} holds it; {hint}")
    for name in sorted(first):
        shapes = before.shape(name), after.shape(name)
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{after.folder}: tensor {name} has shape {shapes[1]}, but {shapes[0]} in {before.folder}; "
                "compare two checkpoints of one architecture and one vocabulary"
            )
        for folder in (before, after):
            if folder.dtype(name) not in _FLOATS:
                raise InputError(
                    f"{folder.folder}: tensor {name} is stored as {folder.dtype(name)}; only {', '.join(_FLOATS)} can "
                    "be compared (convert a quantised checkpoint back first)"
                )
        if 0 in shapes[0]:
            skipped.add(name)
    return sorted(first - skipped), sorted(skipped)


def _tally_tensor(name: str, before: TensorFolder, after: TensorFolder) -> _Tally:
    tally = _Tally()
    a, b = before.load(name).reshape(-1), after.load(name).reshape(-1)
    for block_a, block_b in zip(a.split(_BLOCK), b.split(_BLOCK), strict=True):
        tally.add_block(block_a, block_b)
    # Both sums are finite only if every value is: this finds NaN and Inf without another pass over the data.
    if not (math.isfinite(tally.square_before) and math.isfinite(tally.square_change)):
        folder = after if torch.isfinite(a).all() else before
        raise InputError(
            f"{folder.folder}: tensor {name} holds NaN, Inf or values beyond float64 squares; the run that wrote it "
            "diverged or the file is damaged, use an earlier checkpoint"
        )
    return tally


def _grouped(tallies: dict[str, _Tally], key: Callable[[str], str | None]) -> dict[str, WeightChange]:
    groups: dict[str, _Tally] = {}
    for name, tally in tallies.items():
        group = key(name)
        if group is not None:
            groups.setdefault(group, _Tally()).add(tally)
    # Numbers in numeric order, so that layer 10 follows layer 9.
    order = sorted(groups, key=lambda group: (int(group) if group.isdigit() else -1, group))
    return {group: groups[group].measure() for group in order}


def compare_weights(before: Path, after: Path) -> WeightComparison:
    """Compare two Hugging Face checkpoints of one architecture, parameter by parameter.

    Each folder holds `model.safetensors`, or shards with `model.safetensors.index.json`. One tensor of each is read at
    a time, so memory is twice the largest tensor as stored; counting is in float64. The two may be stored in different
    types (float64, float32, float16, bfloat16).

    Args:
        before: folder of the reference checkpoint a: relative changes are relative to it.
        after: folder of the later checkpoint b.

    Returns:
        The measures in total, by component, by layer and by tensor. A tied head counts once, under the embedding,
        whether or not a file stores a copy of it.

    Raises:
        InputError: a folder or file is missing or unreadable; the tensors or their shapes differ; a tensor is not of
            floating point, or holds NaN or Inf in either checkpoint; the reference holds nothing but zeros.
    """
    with ExitStack() as stack:
        first, second = TensorFolder(Path(before), stack), TensorFolder(Path(after), stack)
        names, skipped = _comparable(first, second)
        tallies = {name: _tally_tensor(name, first, second) for name in names}
        dtypes = {
            "before": sorted({first.dtype(name) for name in names}),
            "after": sorted({second.dtype(name) for name in names}),
        }
    total = _Tally()
    for tally in tallies.values():
        total.add(tally)
    if total.square_before == 0:
        raise InputError(f"{before}: every weight is zero or there is none, so no change relative to it is defined")
    return WeightComparison(
        total=total.measure(),
        by_component=_grouped(tallies, lambda name: component_of(name)[0]),
        by_subcomponent=_grouped(tallies, lambda name: component_of(name)[1]),
        by_layer=_grouped(tallies, layer_of),
        tensors={name: tally.measure() for name, tally in tallies.items()},
        skipped=tuple(skipped),
        stored_dtypes=dtypes,
    )
