"""Showing how a build goes: a bar with tokens per second and time left, or lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from prism_nemo.data.queues import BuildProgress, Watch

_SECONDS_BETWEEN_LINES = 10.0


def progress_text(state: BuildProgress) -> str:
    """Returns tokens so far, tokens per second and the time left, which follows the bytes of text still to read."""
    rate = state.tokens / max(state.seconds, 1e-9)
    left = "time left unknown"
    if 0 < state.bytes_done <= state.bytes_total:
        seconds = state.seconds * (state.bytes_total - state.bytes_done) / state.bytes_done
        left = f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02} left"
    return f"{state.tokens:,} tokens, {rate:,.0f} tokens/s, {left}"


@contextmanager
def show_progress(say: Callable[[str], None]) -> Iterator[tuple[Callable[[str], None], Watch]]:
    """Yields a function for lines and one for the state of a build; both write to stderr.

    Args:
        say: Writes a line where there is no terminal.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        last = time.monotonic()

        def watch(state: BuildProgress) -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                say(f"{state.source}: {state.bytes_done / max(1, state.bytes_total):.0%}, {progress_text(state)}")

        yield say, watch
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("build", total=None, text="")

        def update(state: BuildProgress) -> None:
            total = state.bytes_total or None
            bar.update(
                task, description=state.source, completed=state.bytes_done, total=total, text=progress_text(state)
            )

        yield lambda line: bar.console.print(line, markup=False, soft_wrap=True), update
    sys.stderr.flush()
