"""What all verbs share: options, and how results and progress are printed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Tp = Annotated[int, typer.Option("--tp", min=1, help="tensor_model_parallel_size")]
Pp = Annotated[int, typer.Option("--pp", min=1, help="pipeline_model_parallel_size")]


def say(line: str) -> None:
    """A line for people, on stderr."""
    typer.echo(line, err=True)


def print_result(result: Any, as_json: bool, text: str) -> None:
    """The result, as JSON or for people."""
    typer.echo(json.dumps(result) if as_json else text)


def show_rich(content: Any, min_width: int) -> None:
    """Print something made with rich; a narrower terminal, or a pipe, gets this width, as rich would crop it."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, min_width)
    console.print(content)


def watcher(name: str) -> Callable[[int, int], None]:
    """Takes how much is done and how much there is, and shows it until the end, which the result tells."""
    from prism_nemo.training.progress import Progress

    progress: list[Progress] = []

    def watch(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress(name, total, 0, True))
        if done < total:
            progress[0].update(done, "")

    return watch


def text_of(path: Path | None) -> str | None:
    """A path as settings have it."""
    return None if path is None else str(path)


def is_main() -> bool:
    """Whether this process, of those that torchrun or Slurm started, is the one that speaks."""
    return int(os.environ.get("RANK", "0")) == 0
