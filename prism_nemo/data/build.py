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
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prism_nemo.data.contamination import Contamination, evaluation_texts
from prism_nemo.data.duplicates import Seen, check_near
from prism_nemo.data.fingerprint import Plan, Planner, read_up_to
from prism_nemo.data.indexed import token_dtype
from prism_nemo.data.join import TEMPORARY, Join, remember, remove_orphans
from prism_nemo.data.lock import folder_lock
from prism_nemo.data.manifest import Manifest, describe, load_manifest
from prism_nemo.data.mixture import Mixture, Source, check_mixture
from prism_nemo.data.part import Part
from prism_nemo.data.queues import BuildProgress, Queue, Watch, run_queues
from prism_nemo.data.tokenise import Job, Tools
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.data.units import units_of
from prism_nemo.data.write_manifest import write_manifest
from prism_nemo.errors import InputError, PrismError

__all__ = ["BuildProgress", "Manifest", "Watch", "build_mixture", "build_shard", "describe", "load_manifest"]

PARTS = "parts"
# Large enough that the Rust tokenizer's threads have work, small enough that a batch of books fits in memory.
_BATCH_CHARACTERS = 1_000_000


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
        shard: `(i, n)`, i from 0: unit number u is done by task u mod n. Of a source with `max_tokens` each task does
            its units until they have an n-th of that; what is still missing then is done by the join.
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
        self._full: set[str] = set()

    @contextmanager
    def open(self, shared: bool) -> Iterator[_Build]:
        """Holds the folder, makes ready what all units need, and turns errors of the disk into words."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with folder_lock(self._folder, shared):
                try:
                    self._tools = Tools(self._tokenizer, self._evaluation_sets())
                    self._planner = Planner(self._mixture, self._tools, self._folder, self._workers)
                    self._parts.mkdir(exist_ok=True)
                    if not shared:  # of a build that was killed
                        for leftover in (*self._folder.glob(f"{TEMPORARY}*"), *self._parts.glob(f"{TEMPORARY}*")):
                            leftover.unlink(missing_ok=True)  # its writer may just be giving it up, or its name
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
        plans = self._planner.plans()
        ordered = self._planner.in_order(plans)
        pending = [plan for plan in ordered if plan.finished is None]
        done = self._run([self._queue(plan) for plan in pending])
        seen = None if self._mixture.deduplicate is None else Seen(self._mixture.deduplicate)
        used: set[Path] = set()
        for plan in ordered:
            if plan.finished is not None:
                kept = plan.finished
                self._say(f"{kept.name}: unchanged, {kept.documents:,} documents, {kept.tokens:,} tokens kept")
                if seen is not None:
                    remember(seen, kept, self._planner.seen_file(kept.prefix))
                continue
            parts = self._join(plan, plans, done, seen)
            used.update(parts)
            if not keep_parts:
                for path in parts:
                    path.unlink(missing_ok=True)
        next(done, None)  # ends the pool, and with it what ran ahead of a source that had enough
        manifest = write_manifest(
            self._folder,
            self._mixture,
            self._tools,
            plans,
            tuple(plan.source.name for plan in plans if plan in pending),
        )
        remove_orphans(self._folder, {item.prefix for item in manifest.sources})
        for file in self._parts.glob("*.part"):
            if not keep_parts or (pending and file not in used):
                file.unlink(missing_ok=True)
        if not pending:
            self._say(f"{self._folder}: nothing to do, all {len(plans)} sources are up to date")
        return manifest

    def share(self, index: int, count: int) -> int:
        """Does every unit whose number is `index` modulo `count`."""
        pending = [plan for plan in self._planner.plans(look=self._is_built_once) if plan.finished is None]
        number = itertools.count()
        queues = []
        for plan in pending:
            queue = self._queue(plan)
            if queue.tokens is None:
                queue.jobs = [job for job in queue.jobs if next(number) % count == index]
            else:
                queue = Queue(queue.source, itertools.islice(queue.jobs, index, None, count), queue.tokens / count)
            queues.append(queue)
        limits, tokens = {queue.source: queue.tokens for queue in queues}, dict.fromkeys((q.source for q in queues), 0)
        units = 0
        for found in filter(None, self._run(queues)):
            job, part = found
            units += 1
            tokens[job.source] += part.tokens
            limit = limits[job.source]
            if limit is not None and tokens[job.source] >= limit:
                self._full.add(job.source)
        self._say(
            f"shard {index}/{count}: {units:,} units are done; when all shards are, run the same command without "
            "--shard to join them"
        )
        return units

    def _is_built_once(self, source: Source) -> bool:
        return any(self._folder.glob(f"{source.name}-*.json"))

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

    def _queue(self, plan: Plan) -> Queue:
        source = plan.source
        # With a limit the later files are not even listed before they are needed.
        jobs = (
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
            for item in plan.items
            for unit in units_of(item)
        )
        return Queue(source.name, list(jobs) if source.max_tokens is None else jobs, source.max_tokens)

    def _run(self, queues: list[Queue]) -> Iterator[tuple[Job, Part] | None]:
        return run_queues(queues, self._tools, self._workers, self._full, self._watch)

    def _join(
        self, plan: Plan, plans: list[Plan], done: Iterator[tuple[Job, Part] | None], seen: Seen | None
    ) -> list[Path]:
        """Takes the parts of a source as they come and writes its files; returns what it took."""
        join, read = Join(plan, self._folder, seen), plan.items
        for found in iter(lambda: next(done), None):
            job, part = found
            join.add(job.unit, part)
            if join.full:
                self._full.add(job.source)
                read = read_up_to(plan.items, job)
        plan.check_unchanged()
        self._planner.settle(plan, plans, read)
        dtype = token_dtype(self._tokenizer.vocab_size)
        plan.finished, line = join.finish(dtype, self._planner.seen_file(plan.prefix))
        self._say(line)
        return join.parts
