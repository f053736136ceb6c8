"""The work of all sources, one after the other, and how far it has come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prism_nemo.data.part import Part
from prism_nemo.data.tokenise import Job, Tools
from prism_nemo.data.workers import run_jobs


@dataclass
class BuildProgress:
    """Where a build stands; handed out after every unit.

    Attributes:
        source: The source that the unit belongs to.
        bytes_done: Of the files, units that were found ready included.
        bytes_total: Of all sources that have to be built; with `max_tokens` as far as the bytes per token so far tell.
        tokens: Tokenised so far.
        seconds: Since the first unit.
    """

    source: str
    bytes_done: int
    bytes_total: int
    tokens: int
    seconds: float


Watch = Callable[[BuildProgress], None]


@dataclass
class Queue:
    """The work of one source.

    Attributes:
        source: Its name.
        jobs: In order. Of a source with a limit they are made one by one, as later files may never be needed.
        tokens: About where it will be stopped; None if all jobs are done, which are a list then.
    """

    source: str
    jobs: Iterable[Job]
    tokens: float | None = None


def run_queues(
    queues: list[Queue], tools: Tools, workers: int, full: set[str], watch: Watch
) -> Iterator[tuple[Job, Part] | None]:
    """Yields each job with its part, and None where a source ends.

    Args:
        queues: In the order in which they are wanted.
        tools: As for `run_jobs`.
        workers: As for `run_jobs`.
        full: Names of sources that have enough, to be filled while parts are taken.
        watch: Told after each part.

    Raises:
        InputError: As for `run_jobs`; so are PrismError and OSError.
    """

    def jobs() -> Iterator[Job | None]:
        for queue in queues:
            yield from itertools.takewhile(lambda job: job.source not in full, queue.jobs)
            yield None

    began = time.monotonic()
    total = {q.source: 0 if q.tokens is not None else sum(job.unit.bytes for job in q.jobs) for q in queues}
    limits = {queue.source: queue.tokens for queue in queues if queue.tokens is not None}
    seen = dict.fromkeys(total, 0)
    tokens = 0
    current = iter(queues)
    for found in run_jobs(jobs(), tools, workers, full):
        if found is None:
            name = next(current).source
            limits.pop(name, None)
            total[name] = seen[name]
            yield None
            continue
        job, path = found
        part = Part(path)
        seen[job.source] += job.unit.bytes
        tokens += part.tokens
        done = sum(seen.values())
        for name, limit in limits.items():
            total[name] = max(seen[name], int(limit * done / max(1, tokens)))
        watch(BuildProgress(job.source, done, sum(total.values()), tokens, time.monotonic() - began))
        yield job, part
