"""Every command of README and documentation: run as it stands; or, where it says why not, parsed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from pages import DOCS, ROOT, Command, commands, pages
from workspace import make_workspace

from prism_nemo.cli import app
from prism_nemo.commands.reference import verbs

Run = Callable[..., tuple[int, str, str]]

FIRST = DOCS / "getting_started.md"
ALL = {page: commands(page) for page in pages()}
VERBS = dict(verbs(typer.main.get_command(app)))


def is_slow(command: Command) -> bool:
    return command.block.mark.startswith("slow:")


def to_run(page: Path, slow: bool = False) -> list[Command]:
    return [c for c in ALL[page] if not c.block.reason and is_slow(c) == slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The readers' folder; this process is in it, and finds the recipes in the repository."""
    folder = make_workspace(tmp_path_factory.mktemp("reader"))
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def finished() -> dict[str, bool]:
    """Which pages ran to their end; later ones use what the first one made."""
    return {}


def run_command(command: Command, place: Path, run: Run) -> None:
    if command.words[0] == "prism-nemo":
        code, out, err = run(*command.words[1:])
        text = out + err
    else:
        program = [sys.executable if command.words[0] == "python" else command.words[0], *command.words[1:]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(program, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        code, text = done.returncode, done.stdout + done.stderr
    assert code == 0, f"{command.text}\nended with {code}:\n{text[-2000:]}"
    assert "Traceback" not in text, command.text


def run_page(page: Path, place: Path, run: Run, slow: bool = False) -> None:
    chosen = to_run(page, slow)
    assert chosen
    for command in chosen:
        run_command(command, place, run)


def test_the_first_page_runs_from_top_to_bottom(place: Path, run: Run, finished: dict[str, bool]) -> None:
    run_page(FIRST, place, run)
    finished["first"] = True
    assert (place / "hf" / "prism" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", [p for p in ALL if p != FIRST and to_run(p)], ids=lambda p: p.name)
def test_the_other_pages_run(page: Path, place: Path, run: Run, finished: dict[str, bool]) -> None:
    assert finished.get("first"), "the first page did not run to its end"
    run_page(page, place, run)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in ALL if to_run(p, slow=True)], ids=lambda p: p.name)
def test_the_slow_blocks_run(page: Path, place: Path, run: Run, finished: dict[str, bool]) -> None:
    if not finished.get("first"):
        run_page(FIRST, place, run)
        finished["first"] = True
    run_page(page, place, run, slow=True)


def parse(command: Command) -> None:
    """Parse a `prism-nemo` command without running it: the verb, its options and the types of their values."""
    words = list(command.words[1:])
    length = next((n for n in (2, 1) if " ".join(words[:n]) in VERBS), 0)
    assert length, f"{command.text}: no such verb"
    verb = VERBS[" ".join(words[:length])]
    try:
        verb.make_context(verb.name, words[length:])
    except Exception as error:
        pytest.fail(f"{command.text}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize("page", list(ALL), ids=lambda p: p.name)
def test_every_command_exists_with_its_options(page: Path) -> None:
    for command in ALL[page]:
        if command.words[0] == "prism-nemo":
            parse(command)
            assert "..." not in command.words, f"{command.text}: write out what stands for the dots"
        elif command.words[0] in ("sbatch", "bash"):
            scripts = [word for word in command.words if word.endswith(".sh")]
            assert scripts, command.text
            assert all((ROOT / script).is_file() for script in scripts), command.text
        elif command.words[:2] == ("python", "-m") and command.words[2].startswith("recipes."):
            assert (ROOT / f"{command.words[2].replace('.', '/')}.py").is_file(), command.text
        elif command.words[0] == "make":
            targets = [word for word in command.words[1:] if "=" not in word]
            makefile = (ROOT / "Makefile").read_text()
            assert all(f"\n{target}:" in makefile for target in targets), command.text
        else:
            assert command.words[0] in ("pip", "export") or command.block.reason, f"{command.text}: unknown program"


def test_what_is_not_run_says_why() -> None:
    run_now = [c for page in ALL for c in to_run(page)]
    slow = [c for page in ALL for c in to_run(page, slow=True)]
    parsed = [c for page in ALL for c in ALL[page] if c.block.reason]
    assert len(run_now) + len(slow) + len(parsed) == sum(len(found) for found in ALL.values())
    assert all(len(c.block.reason) > 10 for c in parsed)
    message = (
        f"commands in the documentation: {len(run_now)} run, {len(slow)} run when slow tests are, {len(parsed)} parsed"
    )
    warnings.warn(message, stacklevel=1)
    assert len(run_now) >= 25


@pytest.mark.parametrize(
    "line",
    ["prism-nemo midtran x", "prism-nemo eval x --sweet y", "prism-nemo export", "prism-nemo plan x --gpus many"],
)
def test_a_wrong_command_is_found(line: str) -> None:
    block = ALL[FIRST][0].block
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        parse(Command(block, tuple(shlex.split(line))))
