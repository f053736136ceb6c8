"""A checkpoint that a process forked from each rank writes, while training goes on: the way for GPUs.

The writers of `prism_nemo.checkpoint.writer` hold a model of their own, which on a GPU would be a second one. Here the
rank collects the sharded state dict and Megatron's plan, copies its tensors to the host, and forks a process that
writes and hashes them; the process never touches the device. What is longer in the training loop than with a writer is
the state dict and the plan, which at the step times of a GPU run are a small share.

Megatron's own callers (`dist_checkpointing/strategies/async_utils.py`) fork too, but a process of theirs that is killed
shows only as "results_queue should not be empty", outlives a killed rank, and leaves the hashing to the training loop.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from prism_nemo.checkpoint.hashes import sha256
from prism_nemo.checkpoint.native import Begun, complete, explained
from prism_nemo.checkpoint.writer import LOWER_PRIORITY
from prism_nemo.parent import end_with_parent


class ForkedSave:
    """One save in the background; every rank makes one at the same time, and calls its methods together.

    Args:
        begun: From `prism_nemo.checkpoint.native.begin`; its content is dropped once it is copied.

    Raises:
        PrismError: If the plan cannot be made.
    """

    def __init__(self, begun: Begun) -> None:
        self._begun = begun
        self._connection: Connection | None = None
        self._process: Any = None
        with explained(begun):
            self._request = dist_checkpointing.save(
                begun.content, str(begun.temporary), content_metadata=None, async_sharded_save=True
            )
            begun.content = {}
            write, arguments = self._request.async_fn, list(self._request.async_fn_args)
            if write is not None:  # a rank whose tensors are all copies of another rank's has nothing to write
                if self._request.preload_fn is not None:
                    arguments[1] = self._request.preload_fn()
                self._fork(write, arguments)

    @property
    def final(self) -> Path:
        """The checkpoint that this will be."""
        return self._begun.final

    def _fork(self, write: Callable[..., None], arguments: list[Any]) -> None:
        # Not a daemon, which could not start the processes that Megatron writes with on a GPU.
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_live, args=(os.getpid(), theirs, write, arguments, self._begun.temporary)
        )
        # The collector would free the rank's CUDA tensors in the child.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._process.start()
        finally:
            if collecting:
                gc.enable()
        theirs.close()

    def done(self) -> bool:
        """Whether every rank's process has ended its work, well or badly; a collective of one number."""
        mine = self._connection is None or self._connection.poll()
        flag = torch.tensor([int(mine)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def finish(self) -> None:
        """Wait for the processes, write the metadata, and give the checkpoint its name.

        Raises:
            PrismError: If writing failed on any rank, with the cause.
        """
        outcome, hashes = self._outcome()
        with explained(self._begun):
            if self._connection is not None:
                self._request.async_fn_args[2].put(outcome)  # where Megatron looks for what was written
            for finalize in self._request.finalize_fns:
                finalize()
            complete(self._begun, hashes)

    def _outcome(self) -> tuple[Any, dict[str, str]]:
        if self._connection is None:
            return None, {}
        try:
            outcome, hashes = self._connection.recv()
        except (EOFError, OSError):
            return RuntimeError("the process that writes checkpoints ended without a message: killed?"), {}
        self._process.join()
        return outcome, hashes

    def abandon(self) -> None:
        """End the process and remove what it wrote; no collective, for other ranks may be gone."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.join()
        if dist.is_initialized() and dist.get_rank() == 0:
            shutil.rmtree(self._begun.temporary, ignore_errors=True)


def _live(parent: int, connection: Connection, *work: Any) -> None:
    """What the forked process does; never returns."""
    gc.disable()
    end_with_parent(parent)
    # The processes that this one starts end with it as well; a signal of death is not inherited.
    own = os.getpid()
    os.register_at_fork(after_in_child=lambda: end_with_parent(own))
    # Slurm and Ctrl-C signal every process of a job; the rank decides what a signal means, and waits for us.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(LOWER_PRIORITY)
    connection.send(_write(*work))
    connection.close()
    os._exit(0)  # no clean-up of what the rank owns


def _write(write: Callable[..., None], arguments: list[Any], folder: Path) -> tuple[Any, dict[str, str]]:
    """Write, then hash what was written.

    Returns:
        What Megatron expects of its writers, or the error; and the SHA-256 of each file.
    """
    results: queue.Queue[Any] = queue.Queue()
    try:
        write(arguments[0], arguments[1], results)
        outcome = results.get_nowait()
        if isinstance(outcome, Exception):
            return outcome, {}
        names = {result.storage_data.relative_path for part in outcome.values() for result in part}
        return outcome, {name: sha256(folder / name) for name in sorted(names)}
    except Exception as error:
        return error, {}
