"""A step's rollouts as a person reads them: what was asked, what the policy wrote, how it was scored."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prism_nemo.errors import InputError
from prism_nemo.rl.store import read_rollouts

ORDERS = ("prompt", "best", "worst", "longest", "shortest")
_LONGEST_SHOWN = 2000


def select(
    lines: list[dict[str, Any]], task: str | None = None, order: str = "prompt", limit: int | None = None
) -> list[dict[str, Any]]:
    """The rollouts to look at.

    Args:
        lines: As `read_rollouts` gives them.
        task: Only this task's.
        order: ``prompt`` (groups together), ``best`` and ``worst`` by reward, ``longest`` and ``shortest`` by tokens.
        limit: At most so many.

    Raises:
        InputError: For an unknown order, or a task that the step does not have.
    """
    if order not in ORDERS:
        raise InputError(f"--sort {order}: choose one of {', '.join(ORDERS)}")
    tasks = sorted({line["task"] for line in lines})
    if task is not None and task not in tasks:
        raise InputError(f"--task {task}: the step has {', '.join(tasks)}")
    chosen = [line for line in lines if task is None or line["task"] == task]
    if order in ("best", "worst"):
        chosen.sort(key=lambda line: line["reward"], reverse=order == "best")
    elif order in ("longest", "shortest"):
        chosen.sort(key=lambda line: line["tokens"], reverse=order == "longest")
    return chosen if limit is None else chosen[:limit]


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task: responses, mean reward, share in form, share finished, mean length, groups that teach."""
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_task[line["task"]].append(line)
    rows = []
    for task, found in sorted(by_task.items()):
        groups: dict[int, list[float]] = defaultdict(list)
        for line in found:
            groups[line["prompt_number"]].append(line["reward"])
        rows.append(
            {
                "task": task,
                "responses": len(found),
                "reward": sum(line["reward"] for line in found) / len(found),
                "well_formed": sum(line["well_formed"] for line in found) / len(found),
                "finished": sum(line["finished"] for line in found) / len(found),
                "tokens": sum(line["tokens"] for line in found) / len(found),
                "groups": len(groups),
                "live_groups": sum(max(rewards) > min(rewards) for rewards in groups.values()),
            }
        )
    return rows


def view(run: Path, step: int, chosen: list[dict[str, Any]], all_lines: list[dict[str, Any]]) -> Group:
    """What `prism-nemo rollouts show` prints."""
    table = Table(title=f"{run}, step {step}", title_justify="left")
    for name in ("task", "responses", "reward", "in form", "finished", "tokens", "live groups"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in summary(all_lines):
        table.add_row(
            row["task"],
            str(row["responses"]),
            f"{row['reward']:.3f}",
            f"{row['well_formed']:.0%}",
            f"{row['finished']:.0%}",
            f"{row['tokens']:.0f}",
            f"{row['live_groups']} of {row['groups']}",
        )
    return Group(table, *(_panel(line) for line in chosen))


def _panel(line: dict[str, Any]) -> Panel:
    full, none = line["score"] >= 1, line["score"] <= 0
    body = Text()
    body.append(_cut(line["prompt"]), style="dim")
    body.append(_cut(line["response"]))
    body.append("\n")
    notes = [f"wanted {line['answer']!r}", f"read {line['extracted']!r}"]
    if not line["well_formed"]:
        notes.append("not in form")
    if not line["finished"]:
        notes.append("cut off")
    notes += [f"{name} {value:+.2f}" for name, value in line.get("penalties", {}).items()]
    if "failure" in line:
        notes.append(f"no verdict: {line['failure']}")
    body.append("  ".join(notes), style="italic")
    title = f"{line['task']}  prompt {line['prompt_number']}  reward {line['reward']:g}  " + (
        f"advantage {line['advantage']:+.2f}  {line['tokens']} tokens"
    )
    return Panel(
        body, title=Text(title), title_align="left", border_style="green" if full else "red" if none else "yellow"
    )


def _cut(text: str) -> str:
    if len(text) <= _LONGEST_SHOWN:
        return text
    half = _LONGEST_SHOWN // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def show(run: Path, step: int, task: str | None, order: str, limit: int | None, console: Console) -> None:
    """Print a step's rollouts.

    Raises:
        InputError: If the step was not recorded, or `select` refuses.
    """
    lines = read_rollouts(run, step)
    console.print(view(run, step, select(lines, task, order, limit), lines))
