"""A process beside each rank that writes checkpoints while training goes on.

It is forked before the rank has threads, process groups or a model, and builds a model and an optimizer of its own, in
process groups of its own. To save, the rank copies its tensors into shared memory and goes on; the writer copies them
into its model and calls the very `prism_nemo.checkpoint.native.save` that a synchronous save calls, with the hashes,
the check and the renaming. A rank talks to its own writer only; the writers agree among themselves.

Megatron's own asynchronous save forks a writer for each checkpoint, after making the sharded state dict in the training
loop: at pocket size 270 ms for the state dict, 30 ms for the plan and 18 ms for the fork, where the copy takes 1.5 ms.
"""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.checkpoint.native import TrainState, restore_generators, save
from prism_nemo.checkpoint.retention import remove_old
from prism_nemo.checkpoint.snapshot import Entry, Staging, Trained, set_group_values, state_tensors
from prism_nemo.errors import PrismError
from prism_nemo.models.family import Architecture
from prism_nemo.parent import end_with_parent

_PROBLEM = "problem"
LOWER_PRIORITY = 5  # the training loop goes first where there are fewer cores than processes


@dataclass
class SaveRequest:
    """What a save needs beside the tensors; pickled at the call, so later changes do not reach it.

    Attributes:
        final: Directory that will hold the checkpoint.
        state: The stage's state.
        generators: This rank's random generators.
        groups: Values of the optimizer's groups.
        manifest: More values for the manifest.
        keep: Newest checkpoints that stay.
        keep_every: Steps that stay for ever.
    """

    final: Path
    state: TrainState
    generators: dict[str, Any]
    groups: list[list[dict[str, Any]]]
    manifest: dict[str, Any]
    keep: int
    keep_every: int | None


class Writer:
    """The rank's side of its writer; the process is forked here.

    Create it before anything starts threads or process groups: a fork copies locks in whatever state they are.
    """

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._connection.close()
            _live(theirs, parent)
        theirs.close()
        self._staging: Staging | None = None
        self.writing: Path | None = None

    @property
    def ready(self) -> bool:
        """Whether `build` was called."""
        return self._staging is not None

    def build(self, layout: list[Entry], make: Callable[..., tuple[Trained, Architecture]], *arguments: Any) -> None:
        """Let the writer make its model; returns at once.

        Args:
            layout: Of the tensors of this rank.
            make: Module-level function that returns a trainer and its architecture.
            arguments: For it; picklable.
        """
        self._staging = Staging(layout)
        self._connection.send((layout, make, arguments))
        reduction.send_handle(self._connection, self._staging.descriptor, self.pid)

    def save(self, request: SaveRequest, tensors: dict[str, torch.Tensor]) -> None:
        """Take a snapshot and let the writer write it; returns as soon as the tensors are copied.

        Raises:
            PrismError: If the writer is gone.
        """
        if self._staging is None or self.writing is not None:
            raise PrismError("a checkpoint is still being written; wait for it first")
        self._staging.fill(tensors)
        self.writing = request.final
        try:
            self._connection.send(request)
        except OSError as error:
            raise PrismError(self._gone()) from error

    def poll(self) -> Path | None:
        """The checkpoint that was finished since the last call, if any; takes microseconds.

        Raises:
            PrismError: If writing failed, with the cause.
        """
        if self.writing is None or not self._connection.poll():
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Wait until nothing is being written; the checkpoint that was finished, if any.

        Raises:
            PrismError: If writing failed, with the cause.
        """
        final, self.writing = self.writing, None
        if final is None:
            return None
        try:
            problem = self._connection.recv()
        except (EOFError, OSError) as error:
            self.writing = final
            message = self._gone()
            self.writing = None
            raise PrismError(message) from error
        if problem is not None:
            raise PrismError(problem)
        return final

    def _gone(self) -> str:
        what = f"saving {self.writing} failed: " if self.writing else ""
        how = "the process that writes checkpoints ended without a message: killed?"
        return f"{what}{how} Earlier checkpoints are untouched"

    def close(self, seconds: float = 5.0) -> None:
        """End the process; whatever it is writing is lost, so `wait` first."""
        self._connection.close()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    return
            except ChildProcessError:
                return
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _live(connection: Connection, parent: int) -> None:
    """What the forked process does; never returns."""
    try:
        end_with_parent(parent)
        # Slurm and Ctrl-C signal every process of a job; the rank decides what a signal means, and waits for us.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.nice(LOWER_PRIORITY)
        layout, make, arguments = connection.recv()
        staging = Staging(layout, reduction.recv_handle(connection))
        _serve(connection, staging, make, arguments)
    except EOFError:
        pass  # the rank has closed its end: the stage is over
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # no clean-up of what the rank owns


def _serve(connection: Connection, staging: Staging, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Save as often as asked; after a failure, say why at the next opportunity and end.

    Ending breaks the connections on which the other writers may be waiting for this one; they find the cause in the
    store.
    """
    store: dist.Store | None = None
    try:
        store = _join()
        trained, architecture = make(*arguments)
    except Exception as error:
        problem = _explain(error, "the process that writes checkpoints cannot start", store)
        connection.recv()
        connection.send(problem)
        return
    while True:
        request: SaveRequest = connection.recv()
        try:
            _write(request, staging, trained, architecture)
        except Exception as error:
            connection.send(_explain(error, f"saving {request.final} failed", store))
            return
        connection.send(None)


def _write(request: SaveRequest, staging: Staging, trained: Trained, architecture: Architecture) -> None:
    staging.empty_into(state_tensors(trained))
    set_group_values(trained.optimizer, request.groups)
    restore_generators(request.generators)
    save(request.final, trained.raw, architecture, trained.optimizer, request.state, request.manifest)
    if dist.get_rank() == 0:
        remove_old(request.final.parent, request.keep, request.keep_every)


def _join() -> dist.Store:
    """A process group of the writers, through the store at which the ranks met."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store: dist.Store = dist.HashStore()
    if world_size > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(socket.gethostbyname(address), port, None, False, timedelta(minutes=10))
        store = dist.PrefixStore("prism-nemo-checkpoint-writers", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    return store


def _explain(error: Exception, what: str, store: dist.Store | None) -> str:
    """What to report: the cause that another writer found, where this one only lost its connection to it."""
    own = str(error) if isinstance(error, PrismError) else f"{what} ({str(error) or type(error).__name__})"
    if store is None:
        return own
    try:
        if store.check([_PROBLEM]):
            return str(store.get(_PROBLEM).decode())
        store.set(_PROBLEM, own)
    except Exception:  # the store is gone as well
        return own
    return own
