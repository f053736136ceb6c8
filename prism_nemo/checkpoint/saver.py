"""What a stage asks to save: in the background where that is possible, one checkpoint at a time, kept by policy."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from prism_nemo.checkpoint.forked import ForkedSave
from prism_nemo.checkpoint.lock import RunLock, describe_process
from prism_nemo.checkpoint.native import TrainState, begin, generators, save
from prism_nemo.checkpoint.retention import remove_old
from prism_nemo.checkpoint.snapshot import Trained, group_values, lay_out, state_tensors
from prism_nemo.checkpoint.writer import SaveRequest, Writer
from prism_nemo.config import CheckpointConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.family import Architecture


class TrainedModel(Trained, Protocol):
    """A trainer, as far as saving goes."""

    architecture: Architecture


class Saver:
    """Saves the checkpoints of one stage; a context that does not end before the last one is on disk.

    Create it before `prism_nemo.runtime.start`: the process that writes in the background is forked here.

    Args:
        config: When and how to save.
        fork_each: Fork a process for each save (`prism_nemo.checkpoint.forked`) instead of keeping one with a model of
            its own (`prism_nemo.checkpoint.writer`). None: with CUDA, where that model would be a second one on the
            device.

    Attributes:
        due: Whether the stage owes a checkpoint that it could not save yet.
    """

    def __init__(self, config: CheckpointConfig, fork_each: bool | None = None) -> None:
        self.config = config
        self.due = False
        self._lock: RunLock | None = None
        self._writer: Writer | None = None
        self._pending: ForkedSave | None = None
        self._fork_each = config.async_save and (torch.cuda.is_available() if fork_each is None else fork_each)
        if config.async_save and not self._fork_each and not dist.is_initialized():
            self._writer = Writer()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._pending is not None and error is not None:
                # Finishing it takes every rank, and some may be gone.
                sys.stderr.write(f"{self._pending.final} was still being written and is given up\n")
                self._pending.abandon()
                self._pending = None
            self.wait()
        except PrismError as failed:
            if error is None:
                raise
            sys.stderr.write(f"{failed}\n")  # the error that ends the stage is the one to raise
        finally:
            if self._writer is not None:
                self._writer.close()
            if self._lock is not None:
                self._lock.release()

    def claim(self, directory: Path) -> None:
        """Make this the only run in a directory and end what a killed one left running; every rank calls this.

        Raises:
            InputError: If another run is going on there.
        """
        pids = [os.getpid(), *([self._writer.pid] if self._writer is not None else [])]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [describe_process(pid) for pid in pids])
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                self._lock = RunLock(directory)
                self._lock.end_left_over()
                self._lock.record([process for processes in everyone for process in processes])
            except (InputError, OSError) as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise InputError(problem[0])

    def prepare(self, trained: TrainedModel, make: Callable[..., Any], *arguments: Any) -> None:
        """Let the background process build its model, if there is one that wants one.

        Args:
            trained: This rank's trainer.
            make: Module-level function that makes an equal one there, and returns it with its architecture.
            arguments: For it; picklable.
        """
        if self._writer is not None:
            self._writer.build(lay_out(state_tensors(trained)), make, *arguments)

    def save(
        self,
        final: Path,
        trained: TrainedModel,
        state: TrainState,
        manifest: dict[str, Any],
        background: bool,
    ) -> Path | None:
        """Save; every rank calls this. Waits for the save before, and says so where that takes long.

        Args:
            final: Directory that will hold the checkpoint.
            trained: This rank's trainer.
            state: As it is now; later changes do not reach the checkpoint.
            manifest: More values for the manifest.
            background: Return as soon as the tensors are copied, where that is possible.

        Returns:
            The checkpoint, or None if it is still being written.

        Raises:
            PrismError: If this save or the one before failed, with the cause.
        """
        self.wait()
        keep, keep_every = self.config.keep, self.config.keep_every
        if background and self._writer is not None and self._writer.ready:
            groups = group_values(trained.optimizer)
            request = SaveRequest(final, state, generators(), groups, manifest, keep, keep_every)
            self._writer.save(request, state_tensors(trained))
            return None
        if background and self._fork_each:
            begun = begin(final, trained.raw, trained.architecture, trained.optimizer, state, manifest)
            self._pending = ForkedSave(begun)
            return None
        save(final, trained.raw, trained.architecture, trained.optimizer, state, manifest)
        if dist.get_rank() == 0:
            remove_old(final.parent, keep, keep_every)
        return final

    def poll(self) -> None:
        """Look whether a save in the background has ended; every rank calls this at the same point.

        Takes microseconds, but for the step at which a process that was forked for one save is done.

        Raises:
            PrismError: If it failed, with the cause.
        """
        if self._writer is not None:
            self._writer.poll()
        if self._pending is not None and self._pending.done():
            self._finish()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.finish()
        if dist.get_rank() == 0:
            remove_old(pending.final.parent, self.config.keep, self.config.keep_every)

    def wait(self) -> None:
        """Wait until nothing is being written; every rank calls this.

        Raises:
            PrismError: If the save in the background failed, with the cause.
        """
        if self._pending is not None:
            writing: Path | None = self._pending.final
        else:
            writing = self._writer.writing if self._writer is not None else None
        if writing is None:
            return
        began = time.monotonic()
        try:
            if self._pending is not None:
                self._finish()
            elif self._writer is not None:
                self._writer.wait()
        finally:
            waited = time.monotonic() - began
            if waited > 0.05 and dist.is_initialized() and dist.get_rank() == 0:
                sys.stderr.write(f"waited {waited:.1f} s until {writing.name} was written\n")
