"""Control groups: a limit on the memory of a whole sandbox, where this process may make groups (mostly: as root).

Resource limits hold for each process alone, so sixteen processes may use sixteen times the memory; a group has one.
Both versions of the interface are in use: v1 (a tree for each controller) and v2 (one tree). The number of processes
is not limited here: a dead process counts until the machine's first process has collected it, which may take longer
than the next execution needs to start; RLIMIT_NPROC of the sandbox's own user does it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_NAME = re.compile(r"prism-nemo-(\d+)-\d+")


@dataclass(frozen=True)
class ControlGroup:
    """The group of one sandbox; its folder, or None where groups cannot be made."""

    folder: Path | None

    @property
    def entrance(self) -> str | None:
        """The file into which a process writes its id to enter."""
        return None if self.folder is None else str(self.folder / "cgroup.procs")

    def members(self) -> list[int]:
        """Ids of the processes within."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]
        return []

    def kills(self) -> int:
        """How often the kernel killed a process here because the memory was used up."""
        for name in ("memory.events", "memory.oom_control") if self.folder else ():
            with contextlib.suppress(OSError):
                for line in (self.folder / name).read_text().splitlines():  # type: ignore[operator]
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        return 0

    def empty(self, seconds: float = 5.0) -> bool:
        """Kill all within and wait until they are gone; False if that took longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while members := self.members():
            for member in members:
                with contextlib.suppress(OSError):
                    os.kill(member, signal.SIGKILL)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def remove(self) -> None:
        """Remove the group, if it is empty."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def make_group(number: int, memory_bytes: int) -> ControlGroup:
    """Make a group of this process.

    Args:
        number: Different for each group that this process has.
        memory_bytes: All processes and their tmpfs together; swap is not to be used.
    """
    for parent, limit, swap in _parents():
        folder = parent / f"prism-nemo-{os.getpid()}-{number}"
        try:
            folder.mkdir(exist_ok=True)
            (folder / limit).write_text(str(memory_bytes))
            if (folder / swap).exists():
                (folder / swap).write_text("0")
            return ControlGroup(folder)
        except OSError:  # not ours to make, or the controller is not enabled
            with contextlib.suppress(OSError):
                folder.rmdir()
    return ControlGroup(None)


def sweep() -> None:
    """Remove groups whose process was killed before it could."""
    for parent, _, _ in _parents():
        with contextlib.suppress(OSError):
            for folder in parent.glob("prism-nemo-*"):
                match = _NAME.fullmatch(folder.name)
                if match and not Path(f"/proc/{match[1]}").exists():
                    with contextlib.suppress(OSError):
                        folder.rmdir()


def _parents() -> list[tuple[Path, str, str]]:
    """Folders in which groups of this process can lie; each with the file of the memory limit and that of swap."""
    found: list[tuple[Path, str, str]] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                found.append((_ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes", "memory.swappiness"))
            elif controllers == "":
                found.append((_ROOT / path.lstrip("/"), "memory.max", "memory.swap.max"))
    return [entry for entry in found if entry[0].is_dir()]
