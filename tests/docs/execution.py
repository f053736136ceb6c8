"""Running a command of the documentation, each kind of program in its own way; what goes wrong fails the test."""

from __future__ import annotations

import argparse
import os
import pty
import re
import runpy
import select
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pages import ROOT, Command
from stand_ins import at_pocket_size, has_nemo_run, refusal_of

Run = Callable[..., tuple[int, str, str]]
Kind = Literal["dry", "refused", "slurm", "slow", "run"]
# What a target of make does, at least.
TARGETS = {
    "quickstart": ("pip install", "prism-nemo quickstart --out runs/quickstart"),
    "study": ("pip install", "prism-nemo study --out study"),
    "study-page": ("prism-nemo study --out study --data docs/data --page docs/pocket_study.md",),
    "test": ("ruff check", "mypy", "python -m pytest -m"),
}
_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/")
_PATIENCE = 120.0  # seconds until a process must have said something


def kind_of(command: Command) -> Kind:
    """How a command is tested; ``dry``: what it would do is asked for and compared."""
    if command.words[0] in ("make", "pip"):
        return "dry"
    if refusal_of(command) is not None:
        return "refused"
    return next((kind for kind in ("slurm", "slow") if kind in command.block.clauses), "run")


@dataclass
class Place:
    """Where and how the commands of a block are run.

    Attributes:
        folder: The readers'; this process is in it.
        run: The fixture.
        environment: Of programs other than `prism-nemo`; `export` adds to it.
        capture: Gives and forgets what this process has printed.
    """

    folder: Path
    run: Run
    environment: dict[str, str]
    capture: Callable[[], str]


def run_command(command: Command, place: Place) -> str:
    """Run a command at the size that its block asks for.

    Args:
        command: As written.
        place: Where.

    Returns:
        What it printed.

    Raises:
        AssertionError: If it did not end as it should, or left out what it was to write.
    """
    small, refusal = at_pocket_size(command), refusal_of(command)
    if refusal is not None and refusal.possible():
        if refusal.elsewhere:
            return ""
        refusal = None
    forwarded = None
    if small.words[0] == "ssh":
        forwarded, small = over_there(small)
    if small.words[0] == "prism-nemo" and small.words[1] == "watch" and "--once" not in small.words:
        text = watch(small, place)
        assert forwarded is None or f"http://{forwarded}/" in text, f"{command.text}: forwards to {forwarded}:\n{text}"
        return text
    if small.words[0] == "export":
        place.environment |= dict(word.split("=", 1) for word in small.words[1:])
        return ""
    code, text = _execute(small, place)
    said = f"{small.text}\nended with {code}:\n{text[-2000:]}"
    assert "Traceback" not in text, said
    if refusal is not None:
        assert code == 2, said
        assert refusal.message in text, said
        return text
    assert code == 0, said
    for path in written_by(small.words):
        assert (place.folder / path).exists(), f"{small.text}\nhas not written {path}:\n{text[-2000:]}"
    return text


def written_by(words: Sequence[str]) -> list[str]:
    """Paths that a command of ours says it writes."""
    if words[0] != "prism-nemo" or words[1] == "plan":
        return []
    found = [after for word, after in pairwise(words) if word in ("--out", "--card")]
    run_dirs = [word.partition("=")[2] for word in words if word.startswith("run_dir=")]
    # A stage that found nothing to do would leave no checkpoint in a directory that was not there before.
    return [*found, *(f"{run_dir}/checkpoints" for run_dir in run_dirs)]


def _execute(command: Command, place: Place) -> tuple[int, str]:
    words = list(command.words)
    if words[0] == "prism-nemo":
        code, out, err = place.run(*words[1:])
        return code, out + err
    # A new process would import torch again; NeMo-Run, where it is, makes the process its own.
    if words[:2] == ["python", "-m"] and not (words[2] == "recipes.launch" and has_nemo_run()):
        return _run_module(words[2:], place)
    if words[0] == "pip":
        return _would_install(words)
    if words[0] == "make":
        return _would_make(words)
    program = [sys.executable if words[0] == "python" else words[0], *words[1:]]
    environment = {**place.environment, **command.environment, "PYTHONPATH": _python_path(place.environment)}
    done = subprocess.run(program, cwd=place.folder, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def _python_path(environment: dict[str, str]) -> str:
    return os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))


def _run_module(words: Sequence[str], place: Place) -> tuple[int, str]:
    """``python -m``, in this process."""
    place.capture()
    before, code = sys.argv, 0
    sys.argv = list(words)
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return code, place.capture()


def _would_install(words: Sequence[str]) -> tuple[int, str]:
    """pip's own answer without the network, and whether our extras are in pyproject.toml."""
    options = ["--dry-run", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[2:]:
        name, _, extras = word.removesuffix("]").partition("[")
        if name == "prism-nemo":
            assert set(extras.split(",")) <= set(known), f"{word}: pyproject.toml has {', '.join(known)}"
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words[1:], *options], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def _would_make(words: Sequence[str]) -> tuple[int, str]:
    """make's own list of what it would do, as if nothing were installed yet (-B)."""
    done = subprocess.run(["make", "-n", "-B", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    for target in (word for word in words[1:] if done.returncode == 0 and "=" not in word):
        assert target in TARGETS, f"make {target}: say in TARGETS what it has to do"
        for part in TARGETS[target]:
            assert part in done.stdout, f"make {target}: does not do: {part}"
    return done.returncode, done.stdout + done.stderr


def over_there(command: Command) -> tuple[str, Command]:
    """What `ssh` starts on the other machine, which is this one here, and the address there that it forwards to.

    Raises:
        AssertionError: For a command that does not forward a port, or that Ctrl-C here would leave running there.
    """
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-t", action="store_true")
    parser.add_argument("-L", default="")
    parser.add_argument("host")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(command.words[1:])
    assert options.L, f"{command.text}: forwards no port"
    assert options.t, f"{command.text}: without a terminal (-t) Ctrl-C ends ssh and not what it started"
    return options.L.partition(":")[2], replace(command, words=tuple(options.command))


def watch(command: Command, place: Place) -> str:
    """Start `prism-nemo watch`, look at what it shows once, and end it as Ctrl-C does."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "prism_nemo", *command.words[1:]],
        cwd=place.folder,
        env={**place.environment, "PYTHONPATH": _python_path(place.environment), "TERM": "xterm", "COLUMNS": "200"},
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    try:
        if "--tui" in command.words:
            text = _read_until(terminal, re.compile(r"step \d+"), command, process)
        else:
            text = _read_until(terminal, _ADDRESS, command, process)
            address = _ADDRESS.findall(text)[0]
            with urllib.request.urlopen(address, timeout=_PATIENCE) as page:
                assert b"page.js" in page.read(), command.text
            with urllib.request.urlopen(f"{address}state.json", timeout=_PATIENCE) as state:
                assert b'"step"' in state.read(), command.text
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + _PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            _read(terminal)  # a process that cannot write does not end
        assert process.poll() == 0, f"{command.text}: ended with {process.poll()} after Ctrl-C"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(terminal)
    return text


def _read(terminal: int) -> str:
    """What has been written to a terminal; waits up to half a second for it."""
    if not select.select([terminal], [], [], 0.5)[0]:
        return ""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # its other end was closed
        time.sleep(0.1)
        return ""


def _read_until(terminal: int, wanted: re.Pattern[str], command: Command, process: subprocess.Popen[bytes]) -> str:
    text, deadline = "", time.monotonic() + _PATIENCE
    while not wanted.search(text):
        ended = process.poll() is not None or time.monotonic() > deadline
        more = _read(terminal)
        text += more
        assert more or not ended, f"{command.text}: said nothing like '{wanted.pattern}':\n{text[-2000:]}"
    return text
