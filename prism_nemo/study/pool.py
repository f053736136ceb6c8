"""Doing the cells: two at a time, in an order that keeps few models, in slices that go on where they stopped."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prism_nemo.errors import InputError, PrismError, StoppedEarly
from prism_nemo.parent import end_with_command
from prism_nemo.run import source_commit, versions, write_json
from prism_nemo.study.folders import Folders
from prism_nemo.study.plan import Cell
from prism_nemo.study.settings import StudySettings, check_settings

_FIRST_GUESS = 150.0  # seconds of a cell before one of its kind was seen
_PRELOAD = ["prism_nemo.runtime.preload", "prism_nemo.study.cell"]

Job = tuple[Cell, bool]  # a cell, and whether only its model is made again


class Study:
    """A study in a folder.

    Args:
        out: The folder; one of other settings is refused.
        settings: Budgets.
        cells: From `plan`.
        say: Receives a line for each cell that is done.
        processes: Cells at a time, one core each.

    Raises:
        InputError: If the folder holds a study of other settings.
    """

    def __init__(
        self, out: Path, settings: StudySettings, cells: list[Cell], say: Callable[[str], None], processes: int = 2
    ) -> None:
        check_settings(settings)
        if processes < 1:
            raise InputError(f"--processes {processes}: must be at least 1")
        self.folders, self.settings, self.cells, self.say = Folders(out.resolve()), settings, cells, say
        self.processes = processes
        self.groups: dict[tuple[str, int], dict[str, Cell]] = {}
        for cell in cells:
            self.groups.setdefault((cell.family, cell.seed), {})[cell.name] = cell
        out.mkdir(parents=True, exist_ok=True)
        record, known = out / "settings.json", asdict(settings)
        before: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {"settings": known}
        if before["settings"] != known:
            raise InputError(f"{out}: holds a study of other settings; choose another --out, or remove it")
        # Numbers are the same bit for bit on one kind of machine: whoever reads them must see if there were several.
        # The same for the code, which may have been mended between two slices.
        seen = {"machines": [*before.get("machines", [])], "commits": [*before.get("commits", [])]}
        for name, now in (("machines", machine()), ("commits", source_commit())):
            seen[name] += [now] if now is not None and now not in seen[name] else []
        write_json(record, {"settings": known, "versions": versions(), **seen, "processes": processes})
        self.done = {cell.key for cell in cells if self.folders.read(cell) is not None}
        self.seconds = self._seen()

    def run(self, slice_minutes: float | None = None) -> None:
        """Do all that is not done.

        Args:
            slice_minutes: No cell is begun that would not end within so many minutes, going by those before it.

        Raises:
            StoppedEarly: At the end of a slice.
            PrismError: If a cell fails; those that ran beside it are finished first.
            InputError: If another process works in the folder.
        """
        with _alone(self.folders.out / "lock"):
            self._run(slice_minutes)

    def _run(self, slice_minutes: float | None) -> None:
        began = time.monotonic()
        end = None if slice_minutes is None else began + 60 * slice_minutes
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        running: dict[Future[float], tuple[Job, float]] = {}
        failed: list[PrismError] = []
        stopped = False
        # A process for each cell: whatever one leaves behind in Megatron's or torch's state, the next does not see it.
        with ProcessPoolExecutor(self.processes, context, max_tasks_per_child=1) as pool:
            while not self._finished() or running:
                while len(running) < self.processes and not failed and not stopped:
                    job = self._next([job for job, _ in running.values()])
                    if job is None:
                        break
                    if end is not None and time.monotonic() + self._expected(job) > end:
                        stopped = True
                        break
                    cell, rebuild = job
                    group = list(self.groups.get((cell.family, cell.seed), {}).values())
                    args = (str(self.folders.out), self.settings, cell, group, rebuild)
                    running[pool.submit(_quietly, *args)] = (job, time.monotonic())
                if not running:
                    break
                ready, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    job, started = running.pop(future)
                    try:
                        spent = future.result()
                    except PrismError as error:
                        failed.append(error)
                        continue
                    except Exception as error:  # a process that was killed, or a fault of ours
                        failed.append(PrismError(f"{job[0].key}: {type(error).__name__}: {error}"))
                        continue
                    self._ended(job, time.monotonic() - started, spent, began)
        if failed:
            raise PrismError(f"{failed[0]}; what was measured is kept, run the same command again") from failed[0]
        if not self._finished():
            left = len(self.cells) - len(self.done)
            raise StoppedEarly(f"end of the slice with {left} of {len(self.cells)} cells left; run it again to go on")

    def _finished(self) -> bool:
        return len(self.done) == len(self.cells)

    def _next(self, running: list[Job]) -> Job | None:
        """The first thing that can be done: a cell whose needs are there, or a model that one of them lacks."""
        busy = {cell.key for cell, _ in running}
        for cell in self.cells:
            if cell.key in self.done or cell.key in busy:
                continue
            if not (self.folders.data(cell.seed) / "done.json").is_file():
                data = Cell("data", cell.seed, "data", "data")
                if data.key not in busy:
                    return data, False
                continue
            found = self._step_to(self.groups[cell.family, cell.seed], cell, busy)
            if found is not None:
                return found
        return None

    def _step_to(self, group: dict[str, Cell], cell: Cell, busy: set[str]) -> Job | None:
        for name in cell.needs:
            need = group[name]
            if need.key in busy or need.key not in self.done:
                return None  # it comes before this one in the plan, so it will be met there
            if not self._present(need):
                return self._again(group, need, busy)
        return cell, False

    def _again(self, group: dict[str, Cell], cell: Cell, busy: set[str]) -> Job | None:
        for name in cell.needs:
            if group[name].key in busy:
                return None
            if not self._present(group[name]):
                return self._again(group, group[name], busy)
        return cell, True

    def _present(self, cell: Cell) -> bool:
        """Whether what others need of a measured cell is still on disk."""
        if cell.kind == "filter":
            return self.folders.prompts(cell.family, cell.seed, cell.parent, "all").with_suffix(".json").is_file()
        measured = self.folders.read(cell) or {}
        # One that has no model of its own stands aside: who needs it says what it does without.
        return measured.get("outcome") != "trained" or any((self.folders.run(cell) / "checkpoints").glob("step_*"))

    def _ended(self, job: Job, seconds: float, cpu: float, began: float) -> None:
        cell, rebuild = job
        self.seconds.setdefault(f"{cell.family}/{cell.kind}", []).append(seconds)
        if cell.kind == "data":
            self.say(f"study  data of seed {cell.seed}  {seconds:.0f} s")
            return
        if not rebuild:
            self.done.add(cell.key)
        self._drop()
        left = sum(self._expected((one, False)) for one in self.cells if one.key not in self.done) / self.processes
        what = "made again" if rebuild else (self.folders.read(cell) or {})["outcome"]
        self.say(
            f"study  {len(self.done)}/{len(self.cells)}  {cell.key}  {what}  {seconds:.0f} s ({cpu:.0f} s of processor)"
            f"  {(time.monotonic() - began) / 60:.0f} min so far, about {left / 60:.0f} min left"
        )

    def _drop(self) -> None:
        """Remove the models that no unfinished cell of their group needs, itself or to start from."""
        for group in self.groups.values():
            needed = {name for cell in group.values() if cell.key not in self.done for name in (cell.name, *cell.needs)}
            needed |= {group[name].parent for name in needed}
            for cell in group.values():
                if cell.name not in needed and cell.has_model:
                    self.folders.drop_model(cell)

    def _expected(self, job: Job) -> float:
        """Seconds of a cell: the longest of its kind and family, of its kind, or a guess."""
        cell = job[0]
        own = self.seconds.get(f"{cell.family}/{cell.kind}")
        kind = [v for key, values in self.seconds.items() if key.endswith(f"/{cell.kind}") for v in values]
        seen = own or kind
        return max(seen[-6:]) if seen else _FIRST_GUESS

    def _seen(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for cell in self.cells:
            timing = self.folders.read(cell, "timing")
            if timing is not None:
                found.setdefault(f"{cell.family}/{cell.kind}", []).append(float(timing["seconds"]))
        return found


def machine() -> dict[str, Any]:
    """What decides the last bits of a number, and how long it takes."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return {"architecture": platform.machine(), "vectors": vectors, "cores": os.cpu_count()}


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a folder's lock: two studies in it would write into each other's run directories.

    Raises:
        InputError: If another process holds it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path.parent}: a study is running there; wait for it, or choose another --out") from None
        yield


def _quietly(*args: Any) -> float:
    """A cell without the progress lines of its stages: two of them at a time would be mixed."""
    from prism_nemo.study.cell import run_cell

    end_with_command()  # a study that was killed must not leave a cell behind, writing where the next start works
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return run_cell(*args)
