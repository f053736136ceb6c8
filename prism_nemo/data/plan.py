"""The order of a run's samples: a pure function of a few recorded values and the sample's number.

A plan says which sources are drawn from and how often. It does not depend on the length of the run, the batch size or
the number of processes, so a position in it is one integer, samples consumed, on any layout. A mixture that is changed
in mid-run adds a segment: from that sample on the new weights hold, and every source goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from prism_nemo.data.indexed import read_index
from prism_nemo.data.interleave import Interleave
from prism_nemo.data.manifest import Manifest, describe
from prism_nemo.data.mixture import nearest
from prism_nemo.data.packing import PACKINGS, count_rows
from prism_nemo.errors import InputError

FORMAT = 1
"""Part of every plan's hash: raise it when the same plan would give another order."""

_CHUNK = 4096


@dataclass(frozen=True)
class Drawn:
    """A source within a segment.

    Attributes:
        name: As in the mixture.
        prefix: Of its files: the name and the first figures of the fingerprint, so that other text is another source.
        share: Of the training tokens.
        rows_per_epoch: Samples that one pass over the source gives.
        fill: Part of those samples that is text and not padding, in (0, 1].
    """

    name: str
    prefix: str
    share: float
    rows_per_epoch: int
    fill: float

    @property
    def weight(self) -> float:
        """Share of samples, not normalised: a source whose rows hold more padding needs more of them."""
        return self.share / self.fill


@dataclass(frozen=True)
class Segment:
    """What holds from a sample on.

    Attributes:
        first_sample: Where it begins.
        sources: What is drawn from.
    """

    first_sample: int
    sources: tuple[Drawn, ...]


@dataclass(frozen=True)
class DataPlan:
    """The order of samples.

    Attributes:
        seed: Of the shuffles, 0 or more.
        seq_length: Tokens of a sample.
        packing: One of `PACKINGS`.
        segments: In order; the first begins at 0.
    """

    seed: int
    seq_length: int
    packing: str
    segments: tuple[Segment, ...]

    @property
    def sources(self) -> tuple[Drawn, ...]:
        """What the newest segment draws from."""
        return self.segments[-1].sources

    @property
    def hash(self) -> str:
        """SHA-256 over all that decides the order."""
        content = [FORMAT, self.to_dict()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_dict` makes an equal plan."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataPlan:
        """The plan that `to_dict` wrote."""
        segments = tuple(
            Segment(item["first_sample"], tuple(Drawn(**drawn) for drawn in item["sources"]))
            for item in values["segments"]
        )
        return cls(values["seed"], values["seq_length"], values["packing"], segments)

    def counts(self, samples: int) -> dict[str, int]:
        """Returns how many of the first `samples` samples come from each source, by prefix, over all segments."""
        found: dict[str, int] = {}
        for number, segment in enumerate(self.segments):
            later = self.segments[number + 1].first_sample if number + 1 < len(self.segments) else samples
            inside = min(samples, later) - segment.first_sample
            if inside <= 0:
                break
            for drawn, count in zip(segment.sources, self._interleave(number).counts(inside), strict=True):
                found[drawn.prefix] = found.get(drawn.prefix, 0) + int(count)
        return found

    def locate(self, sample: int) -> tuple[Drawn, int]:
        """Returns a sample's source, and which of that source's samples it is, counted over the whole run.

        Raises:
            IndexError: A negative number.
        """
        if sample < 0:
            raise IndexError(f"sample {sample} of a plan")
        number = max(i for i, segment in enumerate(self.segments) if segment.first_sample <= sample)
        chunk, place = divmod(sample - self.segments[number].first_sample, _CHUNK)
        source, within, before = _located(self, number, chunk)
        return self.segments[number].sources[source[place]], int(within[place] + before[source[place]])

    def changed_to(self, sources: tuple[Drawn, ...], first_sample: int) -> DataPlan:
        """Returns the plan that draws from other sources or by other weights from a sample on."""
        kept = tuple(segment for segment in self.segments if segment.first_sample < first_sample)
        return DataPlan(self.seed, self.seq_length, self.packing, (*kept, Segment(first_sample, sources)))

    def _interleave(self, number: int) -> Interleave:
        return Interleave([drawn.weight for drawn in self.segments[number].sources])


# A run reads forward, so the chunk at hand and the one that a validation or replay looks at are enough.
@lru_cache(maxsize=4)
def _located(plan: DataPlan, number: int, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A stretch of a segment: source and number within the segment of each sample; what the sources had before it."""
    segment = plan.segments[number]
    source, within = plan._interleave(number).locate(chunk * _CHUNK, _CHUNK)
    had = plan.counts(segment.first_sample)
    before = np.array([had.get(drawn.prefix, 0) for drawn in segment.sources], np.int64)
    return source, within, before


def make_plan(manifest: Manifest, *, seq_length: int, seed: int, packing: str) -> DataPlan:
    """Returns the plan of a run that trains on a build from its first sample on.

    Args:
        manifest: Of the build.
        seq_length: Tokens per sample.
        seed: Of the shuffles.
        packing: One of `PACKINGS`.

    Raises:
        InputError: A number out of range, or an unknown packing.
    """
    if seq_length < 1 or seed < 0:
        raise InputError(f"seq_length {seq_length} must be at least 1 and seed {seed} at least 0.")
    if packing not in PACKINGS:
        raise InputError(f"data.packing: {packing!r} is unknown{nearest(packing, PACKINGS)}")
    return DataPlan(seed, seq_length, packing, (Segment(0, _drawn(manifest, seq_length, packing)),))


def continue_plan(recorded: DataPlan, wanted: DataPlan, consumed_samples: int, change: bool) -> DataPlan:
    """Returns the plan that a resumed run follows.

    Args:
        recorded: From the checkpoint.
        wanted: From the configuration.
        consumed_samples: Where the run stands.
        change: Whether another mixture than the recorded one is what the user asked for.

    Raises:
        InputError: The order would change in a way that cannot be continued, or that was not asked for.
    """
    for name in ("seq_length", "seed", "packing"):
        was, now = getattr(recorded, name), getattr(wanted, name)
        if was != now:
            raise InputError(
                f"{name} is {now}, but this run was started with {was}, and the order of its samples depends on it: "
                f"go on with {was}, or start a stage of its own (init_from) with {now}."
            )
    if recorded.sources == wanted.sources:
        return recorded
    if not change:
        raise InputError(
            f"the data is not what this run was started with: {'; '.join(differences(recorded, wanted))}. Go on with "
            f"the earlier data, or ask for the change from sample {consumed_samples:,} on: data.change_mixture=true."
        )
    return recorded.changed_to(wanted.sources, consumed_samples)


def differences(old: DataPlan, new: DataPlan) -> list[str]:
    """Returns in words how what is drawn from differs."""
    was, now = ({drawn.name: drawn for drawn in plan.sources} for plan in (old, new))
    found = [f"{name} is no longer drawn from" for name in was if name not in now]
    for name, drawn in now.items():
        if name not in was:
            found.append(f"{name} is new ({drawn.share:.2%})")
        elif drawn.prefix != was[name].prefix:
            found.append(f"{name} holds other text")
        elif drawn.share != was[name].share:
            found.append(f"{name} has {drawn.share:.2%} instead of {was[name].share:.2%}")
    return found or ["the sources are in another order"]


def epochs_needed(plan: DataPlan, first_sample: int, end_sample: int) -> dict[str, range]:
    """Returns the epochs of each of the newest segment's sources that a stretch of samples reads, by prefix."""
    before, after = plan.counts(first_sample), plan.counts(end_sample)
    found = {}
    for drawn in plan.sources:
        begin, end = before.get(drawn.prefix, 0), after.get(drawn.prefix, 0)
        if end > begin:
            found[drawn.prefix] = range(begin // drawn.rows_per_epoch, (end - 1) // drawn.rows_per_epoch + 1)
    return found


def check_epochs(plan: DataPlan, manifest: Manifest, samples: int) -> None:
    """Refuses a run that would repeat a source more often than the mixture allows.

    Raises:
        InputError: With the arithmetic.
    """
    counts = plan.counts(samples)
    lines = []
    for drawn in plan.sources:
        limit, epochs = manifest.source(drawn.name).max_epochs, counts[drawn.prefix] / drawn.rows_per_epoch
        # Rows are whole: a run of exactly the allowed epochs may be rounded up by one.
        if limit is not None and counts[drawn.prefix] > np.ceil(limit * drawn.rows_per_epoch):
            lines.append(
                f"{drawn.name}: {counts[drawn.prefix]:,} of {samples:,} samples, one epoch is "
                f"{drawn.rows_per_epoch:,}, so {epochs:.2f} epochs, max_epochs {limit:g}"
            )
    if lines:
        raise InputError(
            f"mixture {manifest.mixture!r}: the run would repeat sources too often: {'; '.join(lines)}. "
            "Train on fewer tokens, lower their weight, add text, or raise max_epochs."
        )


# A start asks several times: what is refused first, the plan itself, a rollback. A prefix holds the fingerprint of its
# text, so the answer does not change.
@lru_cache(maxsize=256)
def _rows_per_epoch(prefix: str, packing: str, seq_length: int) -> int:
    _, lengths, _, _ = read_index(prefix + ".idx")
    return count_rows(packing, lengths, seq_length)


def _drawn(manifest: Manifest, seq_length: int, packing: str) -> tuple[Drawn, ...]:
    found = []
    for row in describe(manifest, 1):
        if row.share > 0:
            item = manifest.source(row.name)
            rows = _rows_per_epoch(manifest.prefix(row.name), packing, seq_length)
            found.append(Drawn(row.name, item.prefix, row.share, rows, item.tokens / (rows * seq_length)))
    return tuple(found)
