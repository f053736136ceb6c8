"""Start several processes with torchrun's own machinery and bring their results and errors back.

On a cluster the processes are started by torchrun or Slurm and `launch` is not used. On one machine, workers are forked
from a server process that has imported torch and Megatron-Core once, so that a stage starts in a fraction of a second.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from prism_nemo.errors import InputError, PrismError, StoppedEarly
from prism_nemo.parent import end_with_command
from prism_nemo.runtime.signals import PassedOn, start_resource_tracker, take_part

_PRELOAD = ["prism_nemo.runtime.preload"]


def _worker(function: Callable[..., Any], args: tuple[Any, ...], errors: str, signals: str) -> Any:
    """Run in each process: keep the error, whole and with its time, for the parent to raise again."""
    end_with_command()
    take_part(Path(signals))
    try:
        return function(*args)
    except BaseException as error:
        known = error if isinstance(error, PrismError) else None
        record = (time.time_ns(), known, traceback.format_exc())
        Path(errors, f"rank{os.environ.get('RANK', '0')}").write_bytes(pickle.dumps(record))
        if not isinstance(error, InputError | StoppedEarly) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(0.5)  # lost a peer? the agent must see the peer that was killed before it sees this rank
        raise


def _raise_first(errors: Path, silent_rank: int | None = None, exit_code: int | None = None) -> None:
    """Raise the error that came first: the others are mostly ranks that lost their peer.

    Args:
        errors: Folder of the ranks' records.
        silent_rank: Rank that the agent saw fail first, if it left no record: it was killed.
        exit_code: Its exit code.
    """
    if silent_rank is not None and not (errors / f"rank{silent_rank}").exists():
        raise PrismError(f"the process of rank {silent_rank} ended without a message (exit code {exit_code}): killed?")
    found = _records(errors)
    if not found:
        return
    _, known, text = found[0]
    raise known or PrismError(f"a process failed:\n{text}")


def _records(errors: Path) -> list[tuple[int, PrismError | None, str]]:
    """The ranks' records, the earliest first."""
    return sorted((pickle.loads(path.read_bytes()) for path in errors.iterdir()), key=lambda record: record[0])


def _ended_by(number: int, errors: Path) -> PrismError:
    """What to raise where a signal ended a worker: another may have saved and said so before."""
    for _, known, _ in _records(errors):
        if isinstance(known, StoppedEarly):
            return known
    return PrismError(
        f"ended at once by {signal.Signals(number).name}, which saved nothing; run the same command again: it goes on "
        "from what it had saved before, if anything"
    )


def launch(function: Callable[..., Any], *args: Any, processes: int = 1) -> Any:
    """Run ``function(*args)`` in `processes` processes that can join one process group.

    Args:
        function: A module-level function.
        args: Picklable arguments, the same for every rank.
        processes: How many; also with one, so that a stage leaves no state behind in the caller.

    Returns:
        What rank 0 returned.

    Raises:
        PrismError: What a rank raised (also InputError and StoppedEarly), or one with its traceback; or that a signal
            ended the work.
    """
    with tempfile.TemporaryDirectory(prefix="prism-nemo-") as scratch:
        errors, signals = os.path.join(scratch, "errors"), os.path.join(scratch, "signals")
        os.mkdir(errors)
        os.mkdir(signals)
        passed_on = PassedOn(Path(signals))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=f"prism-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            monitor_interval=0.05,
            start_method="forkserver",
            signals_to_handle="SIGQUIT",  # the agent's own way: the workers end now
            # Not named, the folder is made in the system's own for temporary files, and never removed.
            logs_specs=DefaultLogsSpecs(log_dir=os.path.join(scratch, "logs")),
        )
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        start_resource_tracker()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # The agent logs a worker's whole traceback also for an InputError; `_raise_first` says what there is to say.
        for name in ("agent.server.api", "multiprocessing.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
        try:
            with passed_on.active():
                results = elastic_launch(config, _worker)(function, args, errors, signals)
        except ChildFailedError as error:
            rank, first = error.get_first_failure()
            if passed_on.last is not None and first.exitcode == -passed_on.last:
                raise _ended_by(passed_on.last, Path(errors)) from error
            _raise_first(Path(errors), rank, first.exitcode)
            raise PrismError(f"a process failed: {error}") from error
        except SignalException as error:
            _raise_first(Path(errors))
            raise _ended_by(error.sigval, Path(errors)) from error
        return results[0]
