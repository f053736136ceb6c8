"""What stands in the documentation: code blocks with their marks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHELL = ("", "bash", "console", "sh")
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
    """

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def reason(self) -> str:
        """Why it is not run; empty if it is."""
        return self.mark.removeprefix("not run:").strip() if self.mark.startswith("not run:") else ""


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


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    return [
        Block(
            str(page.relative_to(ROOT)),
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            found["text"],
            found["mark"] or "",
        )
        for found in _BLOCK.finditer(text)
    ]


def commands(page: Path) -> list[Command]:
    """The commands of a page's shell blocks, in order. A block without a language counts if it names a program."""
    return [command for block in blocks(page) if block.language in SHELL for command in _commands(block)]


# Of blocks without a language only lines that begin with one of these are commands; the others may be any text.
_PROGRAMS = ("prism-nemo", "python", "sbatch", "bash", "make", "pip", "export", "torchrun", "srun", "docker", "pytest")


def _commands(block: Block) -> list[Command]:
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
