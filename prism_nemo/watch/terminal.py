"""The same in a terminal: numbers, curves of one line each, and the latest rollout."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prism_nemo.training.progress import duration
from prism_nemo.watch.state import Watched

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48
_LONGEST = 600  # characters of a prompt or a response


def sparkline(points: Sequence[Sequence[float | None]], width: int = _WIDTH) -> str:
    """A curve in one line: the middle of each bucket, from the lowest to the highest; a space where none is finite.

    Args:
        points: Of `prism_nemo.watch.thin.thin`.
        width: Most characters.
    """
    if not points:
        return ""
    count = min(width, len(points))
    parts = [points[len(points) * i // count : len(points) * (i + 1) // count] for i in range(count)]
    middles = []
    for part in parts:
        known = [(low + high) / 2 for _, low, high in part if low is not None and high is not None]
        middles.append(sum(known) / len(known) if known else None)
    found = [middle for middle in middles if middle is not None]
    low, reach = (min(found), max(found) - min(found)) if found else (0.0, 0.0)
    return "".join(
        " " if one is None else _BARS[min(len(_BARS) - 1, int((one - low) / reach * len(_BARS)))] if reach else _BARS[3]
        for one in middles
    )


def frame(state: dict[str, Any]) -> RenderableType:
    """What is shown of one look (`Watched.look`)."""
    problems: list[RenderableType] = [Text(state["problem"], "red")] if state["problem"] else []
    run = state["run"]
    if run is None:
        return Group(*problems, *([] if problems else [Text("waiting for the first step")]))
    of = f" of {run['steps']:,}" if run["steps"] is not None else ""
    parts: list[RenderableType] = [
        Text(f"{run['name']}  {run['stage']}  {run['state']}  step {run['step']:,}{of}", "bold"),
        Text(
            "  ".join(
                [
                    f"left {duration(run['seconds_left'])}" if run["seconds_left"] is not None else "left –",
                    f"{run['tokens_per_second']:,.0f} tokens/s" if run["tokens_per_second"] is not None else "",
                    f"checkpoint {run['checkpoint_step'] if run['checkpoint_step'] is not None else 'none'}",
                    f"restarts {run['restarts']}",
                ]
            )
        ),
        *problems,
        *(Text(problem, "red") for problem in run["problems"]),
    ]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name in ("metric", "value", "curve"):
        table.add_column(name, justify="right" if name == "value" else "left", no_wrap=name == "curve")
    for chart in run["charts"]:
        for series in chart["series"]:
            label = chart["title"] if len(chart["series"]) == 1 else f"{chart['title']}: {series['label']}"
            value = "–" if series["newest"] is None else f"{series['newest']:.4g}"
            table.add_row(Text(label, overflow="fold"), value, Text(sparkline(series["points"]), "cyan"))
    parts.append(table)
    for one in run["rollouts"][:1]:
        verdict = one["failure"] or ("–" if one["reward"] is None else f"reward {one['reward']:g}")
        text = f"{one['prompt'][:_LONGEST]}\n→ {one['response'][:_LONGEST]}\nexpected: {one['answer']}"
        parts.append(Panel(Text(text), title=Text(f"{one['task']}, step {one['step']}: {verdict}"), title_align="left"))
    parts += [Text(event, "dim") for event in run["events"][-5:]]
    return Group(*parts)


def watch_in_terminal(watched: Watched, console: Console, seconds: float = 2.0) -> None:
    """Show a run until Ctrl-C.

    Args:
        watched: The run.
        console: Where.
        seconds: Between two looks.
    """
    with Live(frame(watched.look()), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            live.update(frame(watched.look()), refresh=True)
