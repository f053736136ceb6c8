"""What stands in the documentation: code blocks with their marks, and the commands in them.

A mark is an HTML comment right above a block; readers do not see it. Its clauses are divided by ``; ``:

| clause | |
|---|---|
| ``slow: REASON`` | run with the slow tests only |
| ``slurm: REASON`` | run with the tests that start a Slurm of their own |
| ``at pocket size`` | run with few steps and short answers (`stand_ins.SIZES`) |
| ``at pocket size: NAME, NAME`` | also with the stand-ins of these names (`stand_ins.STAND_INS`) |
| ``file: PATH`` | the block is this file of the reader's folder |
| ``runs: NAME`` | Python that `test_documentation_site` runs |
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHELL = ("", "bash", "console", "sh")
# Name of a clause -> whether it says something behind a colon; None: it may.
CLAUSES = {"slow": True, "slurm": True, "at pocket size": None, "file": True, "runs": True}
# Of these a block has at most one.
_APART = ("slow", "slurm", "file", "runs")
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Relative to the repository.
        line: Of its fence, from 1.
        language: As written behind the fence.
        text: Its content.
        mark: The HTML comment above it, without the arrows; empty if there is none.
        clauses: Of the mark: name -> text; see the module.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str
    clauses: dict[str, str] = field(default_factory=dict)

    @property
    def stand_ins(self) -> tuple[str, ...] | None:
        """Names of what stands for something else when it is run at pocket size; None where it is run as it stands."""
        if "at pocket size" not in self.clauses:
            return None
        return tuple(name for name in self.clauses["at pocket size"].split(", ") if name)


@dataclass(frozen=True)
class Command:
    """A command of a block.

    Attributes:
        block: Where it stands.
        words: As the shell splits it, without comments.
        environment: Assignments before it.
    """

    block: Block
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """One line for messages."""
        return f"{self.block.page}:{self.block.line}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """README and every page of the site."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def read_mark(mark: str) -> dict[str, str]:
    """The clauses of a mark.

    Args:
        mark: Text of the comment; empty for no clauses.

    Raises:
        ValueError: For a clause that is unknown, given twice, without its text, or beside one that excludes it.
    """
    found: dict[str, str] = {}
    for clause in mark.split("; ") if mark else ():
        name, colon, text = clause.partition(": ")
        if name not in CLAUSES:
            raise ValueError(f"'{name}' is no clause of a mark; choose one of {', '.join(CLAUSES)}")
        if name in found:
            raise ValueError(f"'{name}' is given twice")
        if not text.strip() and (colon or CLAUSES[name]):
            raise ValueError(f"'{name}': nothing behind it")
        found[name] = text.strip()
    if sum(name in found for name in _APART) > 1:
        raise ValueError(f"'{mark}': only one of {', '.join(_APART)}")
    if "at pocket size" in found and any(name in found for name in ("file", "runs")):
        raise ValueError(f"'{mark}': only what is run has a size")
    return found


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        ValueError: For a mark that cannot be read; with page and line.
    """
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line, mark = text.count("\n", 0, match.start("indent")) + 1, match["mark"] or ""
        name = str(page.relative_to(ROOT))
        try:
            found.append(Block(name, line, match["language"], match["text"], mark, read_mark(mark)))
        except ValueError as error:
            raise ValueError(f"{name}:{line}: {error}") from None
    return found


def commands(page: Path) -> list[Command]:
    """The commands of a page's shell blocks, in order. A block without a language counts if it names a program."""
    return [command for block in blocks(page) for command in commands_of(block)]


# Of blocks without a language only lines that begin with one of these are commands; the others may be any text.
_PROGRAMS = ("prism-nemo", "python", "sbatch", "bash", "make", "pip", "export", "torchrun", "srun", "docker", "pytest")


def commands_of(block: Block) -> list[Command]:
    """The commands of a block, in order; none if it is not for a shell."""
    if block.language not in SHELL:
        return []
    found = []
    program = re.compile(rf" *(?:[A-Z_]+=\S* +)*(?:{'|'.join(_PROGRAMS)})(?: |$)")
    for line in block.text.replace("\\\n", " ").splitlines():
        if not block.language and not program.match(line):
            continue
        words = shlex.split(line, comments=True)
        environment = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words:
            found.append(Command(block, tuple(words), environment))
    return found
