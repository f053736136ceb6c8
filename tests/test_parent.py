"""Processes that end with the one that started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from prism_nemo.evaluation import run as evaluation
from prism_nemo.evaluation.settings import EvaluateConfig

CHILD = """
import sys, time
from {module} import {name}
{call}
print("ready", flush=True)
time.sleep(120)
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        ("prism_nemo.parent", "end_with_parent", "end_with_parent(int(sys.argv[1]))"),
        ("prism_nemo.data.workers", "_start_worker", "_start_worker(None, int(sys.argv[1]))"),
    ],
)
def test_a_process_ends_with_a_parent_that_is_killed(module: str, name: str, call: str) -> None:
    program = CHILD.format(module=module, name=name, call=call)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    assert not gone(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait(60)
    deadline = time.monotonic() + 20
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone(pid)


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import sys; from prism_nemo.parent import end_with_parent; end_with_parent(1 << 30); print('goes on')"],
        ["-m", "prism_nemo.rl.rewards.worker", str(1 << 30), "2"],
        ["-m", "prism_nemo.evaluation.in_training.process", json.dumps({"parent": 1 << 30})],
    ],
)
def test_one_whose_parent_ended_before_it_could_ask_ends_at_once(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100, input="")
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False), done.stderr


def test_ranks_that_torchrun_started_evaluate_no_longer_than_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of `launch` end with the command anyway; torchrun's would hold the folder until the last answer."""
    asked: list[int] = []
    monkeypatch.setattr(evaluation, "end_with_parent", asked.append)
    monkeypatch.setattr(evaluation, "led", lambda model, work: None)
    opened: Any = SimpleNamespace(model=None)
    evaluation.evaluate_opened(opened, EvaluateConfig(model="x", out="y"))
    assert asked == [os.getppid()]
