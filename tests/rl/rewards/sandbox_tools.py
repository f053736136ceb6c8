"""Where the sandbox's tests can run, and how they look for what a program left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = os.geteuid() == 0


def _problem() -> str:
    """Why bubblewrap cannot be used here; asked without the code that is tested, whose faults must not skip."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed: apt-get install bubblewrap (as root)"
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if ROOT else []
    trial = subprocess.run(
        [*user, "bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, text=True, timeout=60
    )
    return "" if trial.returncode == 0 else f"bubblewrap does not work on this machine: {trial.stderr.strip()}"


PROBLEM = _problem()
# In CI a missing sandbox is a failure: tests that are skipped there would guard nothing, and nobody would know.
_SKIPPED = bool(PROBLEM) and os.environ.get("CI", "").lower() not in ("true", "1")
BUBBLEWRAP = pytest.param("bubblewrap", marks=pytest.mark.skipif(_SKIPPED, reason=PROBLEM or "works"))
BOTH = [BUBBLEWRAP, pytest.param("process")]


def named(comm: str, seconds: float = 2.0) -> list[int]:
    """Ids of live processes of that name that are still there after some time; dead ones that wait to be collected are
    not counted."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "comm").read_text().strip() == comm and "State:\tZ" not in (folder / "status").read_text():
                    found.append(int(folder.name))
            except OSError:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def inside(pid: int) -> int:
    """The last descendant of a process: the interpreter within a sandbox's chain of processes."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


def waiting_in(sandbox) -> list:
    """The sandboxes that were started ahead."""
    return [process for entries in sandbox._waiting.values() for _, process in entries]
