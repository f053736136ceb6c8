"""Sharing out the work of a build: jobs go to processes, parts come back in the order of the jobs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from prism_nemo.data.tokenise import Job, Tools, process
from prism_nemo.errors import PrismError
from prism_nemo.parent import end_with_parent


def run_jobs(
    jobs: Iterable[Job | None], tools: Tools, workers: int, full: Collection[str] = ()
) -> Iterator[tuple[Job, Path] | None]:
    """Yields the parts in the order of the jobs; errors too come in that order, whichever worker was first.

    Args:
        jobs: Taken a few ahead of the parts. A None among them is yielded in its place.
        tools: Handed to every worker once.
        workers: Processes; 1 works in this one.
        full: Names of sources that have enough; may grow between two parts. Their jobs are dropped, and what became of
            those that ran ahead is not looked at, so it makes no difference how many did.

    Raises:
        InputError: From `process`.
        PrismError: A worker was killed, most often for its memory.
        OSError: From `process`.
    """
    if workers == 1:
        for job in jobs:
            if job is None:
                yield None
            elif job.source not in full:
                yield job, process(job, tools)
        return
    # Spawned, not forked: the parent may hold threads of the tokenizer or of torch, and a fork would copy their locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tools, os.getpid()))
    waiting: deque[tuple[Job, Future[Path]] | None] = deque()
    try:
        for job in jobs:
            if job is None:
                waiting.append(None)
            elif job.source not in full:
                waiting.append((job, pool.submit(_work, job)))
            # Ahead by a few, so that a slow unit at the front does not stop the others, but not by a whole corpus.
            if len(waiting) >= 4 * workers:
                yield from _first(waiting, full)
        while waiting:
            yield from _first(waiting, full)
    except BrokenProcessPool:
        raise PrismError(
            "a worker process was killed, most often because memory ran out; run the same command again with fewer "
            "--workers. Finished parts are kept."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _first(waiting: deque[tuple[Job, Future[Path]] | None], full: Collection[str]) -> Iterator[tuple[Job, Path] | None]:
    """Waits for the job at the front; yields nothing where its source has enough."""
    front = waiting.popleft()
    if front is None:
        yield None
        return
    job, future = front
    if job.source in full:
        future.cancel()
    else:
        yield job, future.result()


_tools: Tools | None = None


def _start_worker(tools: Tools, parent: int) -> None:
    global _tools
    end_with_parent(parent)  # at once: the next build works in the same folder
    _tools = tools
    # One thread per process, or they would fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(job: Job) -> Path:
    assert _tools is not None
    return process(job, _tools)
