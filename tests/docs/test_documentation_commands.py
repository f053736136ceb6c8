"""Every command of README and documentation: parsed and run, at pocket size where it says so.

How a block is run is in its mark (`pages`), what stands for what in `stand_ins`.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from execution import Place, Run, kind_of, run_command
from pages import DOCS, ROOT, Block, Command, blocks, commands_of, pages
from stand_ins import at_pocket_size, check_stand_ins
from workspace import copy_for, make_workspace

from prism_nemo.cli import app
from prism_nemo.commands.reference import verbs

FIRST = DOCS / "getting_started.md"
ALL = {page: [block for block in blocks(page) if commands_of(block)] for page in pages()}
VERBS = dict(verbs(typer.main.get_command(app)))
InBlock = Callable[[Block], Place]


def where(block: Block) -> str:
    return f"{Path(block.page).name}:{block.line}"


def to_run(slow: bool) -> list[Block]:
    """Blocks of all pages but the first that are run here."""
    found = [block for page in ALL if page != FIRST for block in ALL[page]]
    return [b for b in found if "slurm" not in b.clauses and ("slow" in b.clauses) == slow]


def commands_everywhere() -> list[Command]:
    return [command for page in ALL for block in ALL[page] for command in commands_of(block)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The readers' folder."""
    return make_workspace(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def finished() -> dict[str, bool]:
    """Whether Getting started ran to its end; all others use what it made."""
    return {}


@pytest.fixture
def in_folder(run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Place]:
    """Goes into a folder for the rest of a test, in which its Python files are found."""

    def go(folder: Path) -> Place:
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        environment = {**os.environ, "NEMORUN_HOME": str(folder / "nemo-run"), "PYTHONPATH": str(folder)}
        return Place(folder, run, environment, lambda: "".join(capfd.readouterr()))

    return go


@pytest.fixture
def after_first(in_folder: Callable[[Path], Place], place: Path, finished: dict[str, bool]) -> Path:
    """The readers' folder, as Getting started leaves it."""
    if "first" not in finished:
        finished["first"] = False
        there = in_folder(place)
        for block in ALL[FIRST]:
            for command in commands_of(block):
                run_command(command, there)
        finished["first"] = True
    assert finished["first"], "Getting started did not run to its end"
    return place


@pytest.fixture
def in_block(in_folder: Callable[[Path], Place], after_first: Path, tmp_path: Path) -> InBlock:
    """Goes into a folder for one block."""
    return lambda block: in_folder(copy_for(block, after_first, tmp_path / "reader"))


def test_the_first_page_runs_from_top_to_bottom(after_first: Path) -> None:
    assert (after_first / "hf/prism/model.safetensors").is_file()


@pytest.mark.parametrize(
    "block", [*to_run(slow=False), *(pytest.param(b, marks=pytest.mark.slow) for b in to_run(slow=True))], ids=where
)
def test_a_block_of_another_page_runs(block: Block, in_block: InBlock) -> None:
    there = in_block(block)
    for command in commands_of(block):
        run_command(command, there)


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
    for command in (command for block in ALL[page] for command in commands_of(block)):
        if command.words[0] == "prism-nemo":
            parse(command)
            assert "..." not in command.words, f"{command.text}: write out what stands for the dots"
        elif command.words[0] in ("sbatch", "bash"):
            scripts = [word for word in command.words if word.endswith(".sh")]
            assert scripts, command.text
            assert all((ROOT / script).is_file() for script in scripts), command.text
        else:
            known = command.words[0] in ("pip", "make", "export", "ssh") or command.words[:2] == ("python", "-m")
            assert known, f"{command.text}: unknown program"


def test_every_mark_can_be_followed() -> None:
    for page in ALL:
        for block in ALL[page]:
            check_stand_ins(block)
            assert not {"file", "runs"} & set(block.clauses), f"{where(block)}: has commands, and is marked as a file"


def test_most_commands_run_with_every_test() -> None:
    found = commands_everywhere()
    kinds = Counter(kind_of(command) for command in found)
    small = sum(at_pocket_size(command) != command for command in found)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    warnings.warn(f"commands in the documentation: {told}; {small} of them at pocket size", stacklevel=1)
    assert kinds.total() >= 90
    assert kinds["run"] >= 35  # without a mark, or at a size that takes no time: seen by everybody who runs the tests


@pytest.mark.parametrize(
    "line",
    ["prism-nemo midtran x", "prism-nemo eval x --sweet y", "prism-nemo export", "prism-nemo plan x --gpus many"],
)
def test_a_wrong_command_is_found_without_running_it(line: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        parse(Command(ALL[FIRST][0], tuple(shlex.split(line))))


# What only running finds: a key, the name of a value, a file, an extra, a target, the message of a refusal.
WRONG = {
    "prism-nemo midtrain recipes/midtrain.py checkpoint=CKPT data=TOKENS run_dir=runs/x optimizer.lrr=1": "unknown key",
    "prism-nemo midtrain recipes/midtrain.py checkpoint=CKPT data=TOKENS run_dir=runs/x context=4096": "none of the",
    "prism-nemo rl recipes/rl.py checkpoint=CKPT tokenizer=HF_DIR run_dir=runs/x 'tasks=[sums]'": "'sums' is unknown",
    "prism-nemo eval CKPT --suite reasoning --data nowhere --sweet 4": "No such option",
    "prism-nemo verify CKPT HF_DIR": "ended with 2",
    "python -m recipes.show midtrain checkpoint=CKPT data=TOKENS run_dir=r optimiser.lr=1": "unknown key",
    "python -m recipes.launch granite-3.3-8c --executor local": "unknown model",
    "pip install 'prism-nemo[evil]'": "pyproject.toml has",
    "make quikstart": "No rule to make target",
    "prism-nemo watch runs/mid --port many": "said nothing like",
    "ssh -t -L 8265:127.0.0.1:8266 login-node prism-nemo watch runs/mid": "forwards to",
    "ssh -L 8265:127.0.0.1:8265 login-node prism-nemo watch runs/mid": "without a terminal",
    "make lint": "say in TARGETS",
    "prism-nemo rl recipes/rl.py checkpoint=CKPT tokenizer=HF_DIR run_dir=r rollout.backend=vllm tasks=4": "ended with",
}


@pytest.mark.slow  # each runs a command; that wrong ones are found without running is tested at once
@pytest.mark.parametrize("line", list(WRONG))
def test_a_wrong_command_is_found_by_running_it(line: str, in_block: InBlock) -> None:
    block = replace(ALL[FIRST][0], language="bash", text=line, clauses={"at pocket size": "CKPT, TOKENS, HF_DIR"})
    there = in_block(block)
    with pytest.raises(AssertionError, match=WRONG[line]):
        run_command(commands_of(block)[0], there)
