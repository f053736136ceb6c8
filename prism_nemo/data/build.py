"""A mixture of sources becomes one Megatron IndexedDataset per source, and a manifest.

Read, filter, decontaminate and tokenise run in any number of processes, one unit of text at a time (`tokenise.py`);
each leaves a part in `parts/`. The parts of a source are then joined in order, repeated documents left out, into one
pair of files. Units depend on the files alone, and everything that depends on order happens in the join, so the
result is the same bytes whatever the number of processes, and a build that was killed continues with the parts that
are there.

A source's token files carry the fingerprint of their content in the name (`math-3f2a9c01d4e7.bin`). So a changed source
never overwrites files that a running job has open, and Megatron's index caches, which are keyed by path and not by
content, can never be stale. A source counts as built once its `.json` lies beside its tokens, the mixture once
`manifest.json` names them all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from prism_nemo import __version__
from prism_nemo.data.contamination import Contamination, evaluation_texts
from prism_nemo.data.documents import Unit, file_sha256, units_of
from prism_nemo.data.duplicates import DIGEST_BYTES, PERMUTATIONS, Seen, check_near
from prism_nemo.data.indexed import token_dtype, write_index
from prism_nemo.data.lock import folder_lock
from prism_nemo.data.manifest import (
    MANIFEST,
    BuiltSource,
    BuiltTokenizer,
    InputFile,
    Manifest,
    damage,
    describe,
    load_manifest,
    source_from_json,
)
from prism_nemo.data.mixture import Mixture, Source, check_mixture, file_kind
from prism_nemo.data.part import Part
from prism_nemo.data.removed import add_reports, bad_count, summary
from prism_nemo.data.tokenise import RECIPE, Job, Tools, location, run_jobs
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError, PrismError

__all__ = ["Manifest", "build_mixture", "build_shard", "describe", "load_manifest"]

PARTS = "parts"
_TEMPORARY = ".tmp-"
# Large enough that the Rust tokenizer's threads have work, small enough that a batch of books fits in memory.
_BATCH_CHARACTERS = 1_000_000
_EXAMPLES = 20


@dataclass
class BuildProgress:
    """Where a build stands; handed out after every unit.

    Attributes:
        source: The source that the unit belongs to.
        bytes_done: Of the files, units that were found ready included.
        bytes_total: Of all sources that have to be built.
        tokens: Tokenised so far.
        seconds: Since the first unit.
    """

    source: str
    bytes_done: int
    bytes_total: int
    tokens: int
    seconds: float


Watch = Callable[[BuildProgress], None]


def build_mixture(
    mixture: Mixture,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    progress: Callable[[str], None] | None = None,
    workers: int = 1,
    keep_parts: bool = False,
    watch: Watch | None = None,
) -> Manifest:
    """Builds what is new or changed; a second call with the same inputs writes nothing.

    Args:
        mixture: From `load_mixture`.
        tokenizer: From `load_tokenizer`.
        out_dir: Created if missing; belongs to this mixture: token files of sources that left it are removed.
        progress: Receives lines of text: what became of each source, and what was removed from it.
        workers: Processes that read and tokenise. Above 1, call it under `if __name__ == "__main__"`.
        keep_parts: Leave the parts there. Takes as much room again as the tokens, and lets a later build redo only the
            changed stretches of a source, not all of it.
        watch: Receives the progress of tokenising.

    Returns:
        The manifest; `rebuilt` names the sources that were written by this call, empty where there was nothing to do.

    Raises:
        InputError: The mixture is wrong, a document cannot be read (file and line), a source has no tokens, or another
            build is at work in the folder.
        PrismError: The disk is full, a worker was killed, or a file changed while it was read.
    """
    say = progress or (lambda line: None)
    with _Build(mixture, tokenizer, out_dir, workers, say, watch).open(shared=False) as build:
        return build.whole(keep_parts)


def build_shard(
    mixture: Mixture,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    shard: tuple[int, int],
    *,
    progress: Callable[[str], None] | None = None,
    workers: int = 1,
    watch: Watch | None = None,
) -> int:
    """Does one of several equal shares of the work, for a task of a Slurm array; `build_mixture` then joins them.

    All tasks write parts into the same folder and may run side by side or one after the other.

    Args:
        mixture: From `load_mixture`; the same for all tasks.
        tokenizer: The same for all tasks.
        out_dir: Seen by all tasks.
        shard: `(i, n)`, i from 0: unit number u is done by task u mod n.
        progress: Receives lines of text.
        workers: Processes of this task.
        watch: Receives the progress of tokenising.

    Returns:
        The number of units of this share.

    Raises:
        InputError: As for `build_mixture`, and for a shard that is not in [0, n).
        PrismError: As for `build_mixture`.
    """
    index, count = shard
    if not 0 <= index < count:
        raise InputError(f"--shard {index}/{count}: the first number must be from 0 to {count - 1}.")
    say = progress or (lambda line: None)
    with _Build(mixture, tokenizer, out_dir, workers, say, watch).open(shared=True) as build:
        return build.share(index, count)


@dataclass
class _Plan:
    """A source on its way."""

    source: Source
    inputs: list[InputFile]
    stats: list[tuple[str, int, int]]
    fingerprint: str
    finished: BuiltSource | None = None


class _Build:
    """One call of `build_mixture` or `build_shard`."""

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        out_dir: str | Path,
        workers: int,
        say: Callable[[str], None],
        watch: Watch | None,
    ) -> None:
        if workers < 1:
            raise InputError(f"workers: {workers} must be at least 1.")
        check_mixture(mixture, f"mixture {mixture.name!r}")
        if mixture.deduplicate is not None and mixture.deduplicate.near is not None:
            check_near()
        self._mixture, self._tokenizer, self._workers = mixture, tokenizer, workers
        self._say, self._watch = say, watch or (lambda progress: None)
        self._folder = Path(out_dir).resolve()
        self._parts = self._folder / PARTS
        self._dtype = token_dtype(tokenizer.vocab_size)

    @contextmanager
    def open(self, shared: bool) -> Iterator[_Build]:
        """Holds the folder, makes ready what all units need, and turns errors of the disk into words."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with folder_lock(self._folder, shared):
                try:
                    self._tools = Tools(self._tokenizer, self._evaluation_sets())
                    self._parts.mkdir(exist_ok=True)
                    if not shared:  # of a build that was killed
                        for leftover in (*self._folder.glob(f"{_TEMPORARY}*"), *self._parts.glob(f"{_TEMPORARY}*")):
                            leftover.unlink()
                    yield self
                finally:
                    if self._parts.is_dir() and not any(self._parts.iterdir()):
                        self._parts.rmdir()
        except OSError as err:
            if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise PrismError(
                    f"{self._folder}: no room left ({err.strerror}). Free some and run the same command again; what is "
                    "finished is kept."
                ) from err
            raise PrismError(f"{err.filename or self._folder}: {err.strerror or err}") from err

    def whole(self, keep_parts: bool) -> Manifest:
        """Builds all sources and writes the manifest."""
        plans = self._plans()
        pending = [plan for plan in self._in_order(plans) if plan.finished is None]
        jobs = {plan.source.name: self._jobs(plan) for plan in pending}
        done = self._run([job for plan in pending for job in jobs[plan.source.name]])
        seen = None if self._mixture.deduplicate is None else Seen(self._mixture.deduplicate)
        used: set[Path] = set()
        for plan in self._in_order(plans):
            name = plan.source.name
            if plan.finished is not None:
                kept = plan.finished
                self._say(f"{name}: unchanged, {kept.documents:,} documents, {kept.tokens:,} tokens kept")
                self._remember(seen, kept)
                continue
            parts = [(job.unit, Part(next(done))) for job in jobs[name]]
            used.update(part.path for _, part in parts)
            plan.finished = self._join(plan, parts, seen)
            if not keep_parts:
                for _, part in parts:
                    part.path.unlink(missing_ok=True)
        manifest = self._manifest(plans, tuple(plan.source.name for plan in plans if plan in pending))
        _remove_orphans(self._folder, {item.prefix for item in manifest.sources})
        for file in self._parts.glob("*.part"):
            if not keep_parts or (pending and file not in used):
                file.unlink()
        if not pending:
            self._say(f"{self._folder}: nothing to do, all {len(plans)} sources are up to date")
        return manifest

    def share(self, index: int, count: int) -> int:
        """Does every unit whose number is `index` modulo `count`."""
        jobs: list[Job] = []
        for plan in self._plans(look=self._is_built_once):
            if plan.finished is None:
                jobs += self._jobs(plan)
        mine = jobs[index::count]
        for _ in self._run(mine):
            pass
        self._say(
            f"shard {index}/{count}: {len(mine)} of {len(jobs)} units are done; when all shards are, run the same "
            "command without --shard to join them"
        )
        return len(mine)

    def _is_built_once(self, source: Source) -> bool:
        return any(self._folder.glob(f"{source.name}-*.json"))

    # Planning

    def _evaluation_sets(self) -> Contamination | None:
        wanted = self._mixture.decontaminate
        if wanted is None:
            return None
        found = Contamination(evaluation_texts(wanted), wanted.ngram)
        self._say(
            f"decontamination: {found.items:,} texts of {len(wanted.against)} file(s) are looked for by "
            f"{wanted.ngram}-grams; {found.too_short:,} are too short to be looked for"
        )
        return found

    def _in_order(self, plans: list[_Plan]) -> list[_Plan]:
        # Of a text that is held out and trained on, the training copy has to go.
        return sorted(plans, key=lambda plan: plan.source.weight > 0) if self._mixture.deduplicate else plans

    def _plans(self, look: Callable[[Source], bool] = lambda source: True) -> list[_Plan]:
        """Hashes the inputs of all sources and looks what is finished; sources of which `look` is false are not."""
        plans = []
        for source in self._mixture.sources:
            if look(source):
                stats = [_stat(name) for name in source.all_paths()]
                plans.append(_Plan(source, self._hashed(source), stats, ""))
            else:
                plans.append(_Plan(source, [], [], ""))
        chain: list[str] = []
        for plan in self._in_order(plans):
            plan.fingerprint = self._fingerprint(plan, chain)
            if self._mixture.deduplicate is not None:
                chain.append(plan.fingerprint)
            plan.finished = self._find_finished(plan)
        return plans

    def _hashed(self, source: Source) -> list[InputFile]:
        names = source.all_paths()
        with ThreadPoolExecutor(self._workers) as pool:  # hashing and reading let go of the interpreter
            found = [
                InputFile(name, digest, Path(name).stat().st_size)
                for name, digest in zip(names, pool.map(file_sha256, names), strict=True)
            ]
        for item in source.all_inputs():
            if item.hub is not None:
                from prism_nemo.data.hub import hub_commit

                commit = hub_commit(item.hub)
                found.append(InputFile(f"hub:{item.hub.id}/{item.hub.config or ''}/{item.hub.split}", commit, 0))
        return found

    def _fingerprint(self, plan: _Plan, before: list[str]) -> str:
        """Over what decides the tokens; not over where the files lie or what the source weighs."""
        forms = []
        for item in plan.source.all_inputs():
            form = {**asdict(item), "paths": [file_kind(name) for name in item.paths]}
            forms.append(form)
        rule = self._mixture.deduplicate
        content = [
            RECIPE,
            [item.sha256 for item in plan.inputs],
            forms,
            plan.source.max_document_bytes,
            [self._tokenizer.sha256, self._tokenizer.eos_id],
            self._tools.contamination and self._tools.contamination.fingerprint,
            rule and [asdict(rule), before],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _find_finished(self, plan: _Plan) -> BuiltSource | None:
        file = self._folder / f"{plan.source.name}-{plan.fingerprint[:12]}.json"
        try:
            item = source_from_json(json.loads(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if item.fingerprint != plan.fingerprint or damage(self._folder, item):
            return None
        if self._mixture.deduplicate is not None and not self._seen_file(item.prefix).is_file():
            return None
        # The limit may have been lowered since.
        return item if bad_count(item.report) <= plan.source.max_bad else None

    def _seen_file(self, prefix: str) -> Path:
        return self._folder / f"{prefix}.seen.npz"

    # Tokenising

    def _jobs(self, plan: _Plan) -> list[Job]:
        source = plan.source
        return [
            Job(
                source.name,
                unit,
                item,
                self._parts,
                source.max_bad,
                source.max_document_bytes,
                self._mixture.deduplicate,
                _BATCH_CHARACTERS,
            )
            for item in source.all_inputs()
            for unit in units_of(item)
        ]

    def _run(self, jobs: list[Job]) -> Iterator[Path]:
        """Yields the parts in order, telling the watcher after each."""
        began, total = time.monotonic(), sum(job.unit.bytes for job in jobs)
        done = tokens = 0
        for job, path in zip(jobs, run_jobs(jobs, self._tools, self._workers), strict=True):
            done += job.unit.bytes
            tokens += Part(path).tokens
            self._watch(BuildProgress(job.source, done, total, tokens, time.monotonic() - began))
            yield path

    # Joining

    def _join(self, plan: _Plan, parts: list[tuple[Unit, Part]], seen: Seen | None) -> BuiltSource:
        source, prefix = plan.source, f"{plan.source.name}-{plan.fingerprint[:12]}"
        if [_stat(name) for name, *_ in plan.stats] != plan.stats:
            raise PrismError(f"source {source.name!r}: a file changed while it was read; run the same command again.")
        report = add_reports([part.report for _, part in parts])
        if bad_count(report) > source.max_bad:
            first = next(iter(report["bad"].values()))["first"]
            raise InputError(
                f"source {source.name!r}: {bad_count(report):,} documents cannot be read, max_bad is {source.max_bad}; "
                f"the first: {first}"
            )
        bin_file, idx_file = (self._folder / f"{_TEMPORARY}{prefix}{suffix}" for suffix in (".bin", ".idx"))
        lengths, digests, rows = [np.zeros(0, np.int32)], [], []
        characters = 0
        try:
            with open(bin_file, "wb") as stream:
                for unit, part in parts:
                    counts = part.array("lengths")
                    if counts is None:
                        continue
                    keep = self._keep(source.name, unit, part, seen, report)
                    part.copy(keep, stream)
                    lengths.append(counts[keep])
                    characters += int(_array(part, "characters")[keep].sum())
                    if seen is not None:
                        digests.append(_array(part, "digests")[keep])
                        signature = part.array("signatures")
                        rows.append(np.zeros((0, PERMUTATIONS), np.uint32) if signature is None else signature[keep])
            sizes = np.concatenate(lengths)
            if not len(sizes):
                files = f"{len(plan.inputs)} file(s)"
                raise InputError(
                    f"source {source.name!r}: its {files} hold no text, so it has no tokens ({summary(report)})."
                )
            write_index(idx_file, sizes, self._dtype)
            for file, suffix in ((bin_file, ".bin"), (idx_file, ".idx")):
                _sync(file)
                os.replace(file, self._folder / (prefix + suffix))
        except BaseException:
            for file in (bin_file, idx_file):
                file.unlink(missing_ok=True)
            raise
        if seen is not None:
            self._write_seen(prefix, np.concatenate(digests), np.concatenate(rows))
        contaminated = report["contaminated"]
        if contaminated:
            lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in contaminated)
            _write_atomically(self._folder / f"{prefix}.removed.jsonl", lines)
            report["contaminated"] = contaminated[:_EXAMPLES]
        item = BuiltSource(
            name=source.name,
            domain=source.domain,
            weight=source.weight,
            max_epochs=source.max_epochs,
            documents=len(sizes),
            tokens=int(sizes.sum(dtype=np.int64)),
            characters=characters,
            dtype=self._dtype.name,
            fingerprint=plan.fingerprint,
            prefix=prefix,
            inputs=plan.inputs,
            report=report,
        )
        # Last: this file says that the pair is whole.
        _write_atomically(
            self._folder / f"{prefix}.json", json.dumps(asdict(item), indent=2, ensure_ascii=False) + "\n"
        )
        self._say(f"{source.name}: {item.documents:,} documents, {item.tokens:,} tokens; {summary(report)}")
        return item

    def _keep(self, name: str, unit: Unit, part: Part, seen: Seen | None, report: dict[str, Any]) -> np.ndarray:
        """Which documents of a part are no repetition."""
        keep = np.ones(part.documents, bool)
        if seen is None:
            return keep
        lines, signatures = _array(part, "lines"), part.array("signatures")
        for i, key in enumerate(_array(part, "digests")):
            found = seen.add(key.tobytes(), None if signatures is None else signatures[i], name)
            if found is not None:
                keep[i] = False
                kind, where = found
                report["duplicates"][kind] = report["duplicates"].get(kind, 0) + 1
                if len(report["duplicate_examples"]) < _EXAMPLES:
                    at = location(unit, int(lines[i]))
                    report["duplicate_examples"].append({"at": at, "kind": kind, "source": where})
        return keep

    def _remember(self, seen: Seen | None, item: BuiltSource) -> None:
        """Takes the documents of an unchanged source as seen."""
        if seen is None:
            return
        with np.load(self._seen_file(item.prefix)) as stored:
            digests, rows = stored["digests"], stored["signatures"]
        for i, key in enumerate(digests):
            seen.add(key.tobytes(), rows[i] if len(rows) else None, item.name)

    def _write_seen(self, prefix: str, digests: np.ndarray, rows: np.ndarray) -> None:
        temporary = self._folder / f"{_TEMPORARY}{prefix}.seen.npz"
        np.savez(temporary, digests=digests.reshape(-1, DIGEST_BYTES), signatures=rows)
        _sync(temporary)
        os.replace(temporary, self._seen_file(prefix))

    # The manifest

    def _manifest(self, plans: list[_Plan], rebuilt: tuple[str, ...]) -> Manifest:
        tokenizer, mixture = self._tokenizer, self._mixture
        built = []
        for plan in plans:
            assert plan.finished is not None
            source = plan.source
            # Weight, limit and the place of the files may change without touching the tokens.
            built.append(
                replace(
                    plan.finished,
                    domain=source.domain,
                    weight=source.weight,
                    max_epochs=source.max_epochs,
                    inputs=plan.inputs,
                )
            )
        manifest = Manifest(
            dir=self._folder,
            mixture=mixture.name,
            retention=None if mixture.retention is None else asdict(mixture.retention),
            tokenizer=BuiltTokenizer(
                str(tokenizer.path.resolve()),
                tokenizer.sha256,
                tokenizer.vocab_size,
                tokenizer.eos_id,
                tokenizer.pad_id,
            ),
            versions={"prism_nemo": __version__, **{name: version(name) for name in ("megatron-core", "tokenizers")}},
            sources=built,
            deduplicate=None if mixture.deduplicate is None else asdict(mixture.deduplicate),
            decontaminate=self._decontaminated(),
            rebuilt=rebuilt,
        )
        file = self._folder / MANIFEST
        text = manifest.to_json()
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            _write_atomically(file, text)
        return manifest

    def _decontaminated(self) -> dict[str, Any] | None:
        wanted, found = self._mixture.decontaminate, self._tools.contamination
        if wanted is None or found is None:
            return None
        files = [asdict(InputFile(name, file_sha256(name), Path(name).stat().st_size)) for name in wanted.against]
        return {"ngram": wanted.ngram, "items": found.items, "too_short": found.too_short, "against": files}


def _remove_orphans(folder: Path, prefixes: set[str]) -> None:
    """Removes the token files of changed or dropped sources; only triples that a build here has finished."""
    for file in folder.glob("*.json"):
        pair = [file.with_name(file.stem + suffix) for suffix in (".bin", ".idx")]
        if file.name != MANIFEST and file.stem not in prefixes and all(item.is_file() for item in pair):
            more = [file.with_name(file.stem + suffix) for suffix in (".seen.npz", ".removed.jsonl")]
            for item in (file, *pair, *more):
                item.unlink(missing_ok=True)


def _array(part: Part, name: str) -> np.ndarray:
    values = part.array(name)
    if values is None:
        raise PrismError(f"{part.path}: has no {name}; remove the file and run the same command again.")
    return values


def _stat(name: str) -> tuple[str, int, int]:
    found = os.stat(name)
    return name, found.st_size, found.st_mtime_ns


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f"{_TEMPORARY}{file.name}")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, file)


def _sync(file: Path) -> None:
    # A rename can reach the disk before the data it names; after a power cut that is a whole-looking file of zeros.
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
