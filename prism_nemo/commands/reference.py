"""The page of all commands, made from the command itself, so that it cannot say anything else."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TOP = """# All commands

Made by `python -m prism_nemo.commands.reference docs/commands.md` from the command itself;
do not edit. Every verb takes `--help`.

Exit codes: 0 done; 1 the work failed; 2 the input is wrong, nothing was started; 75 stopped early with a checkpoint
saved: run the same command again.
"""


def verbs(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Names and click commands of everything that can be run.

    Args:
        command: A click command or group, such as `typer.main.get_command(app)`.
        path: Of its group.
    """
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from verbs(child, f"{path} {name}".strip())
    else:
        yield path, command


def reference(command: Any) -> str:
    """The page as Markdown.

    Args:
        command: The click group of `prism-nemo`.
    """
    parts = [_TOP]
    for path, verb in verbs(command):
        shown = [p for p in verb.params if not getattr(p, "hidden", False)]
        arguments = [p for p in shown if p.param_type_name == "argument"]
        options = [p for p in shown if p.param_type_name == "option"]
        usage = " ".join([f"prism-nemo {path}", *(_usage(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
        parts.append(f"## {path}\n\n`{usage}`\n\n{_text(verb.help)}\n")
        rows = [f"| `{_name(p)}` | {_text(_help(p))} | {_default(p)} |" for p in (*arguments, *options)]
        if rows:
            parts.append("\n".join(["| | means | default |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _usage(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name or "").upper().strip("[]{}.")
    name += "..." if parameter.nargs == -1 else ""
    return name if parameter.required else f"[{name}]"


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _usage(parameter)
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _help(parameter: Any) -> str:
    return str(getattr(parameter, "help", None) or "")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or isinstance(value, bool) or callable(value) or value in ((), []):
        return ""
    return "" if type(value).__module__.startswith(("click", "typer")) else f"`{value}`"


def _text(text: str | None) -> str:
    """Help in one line of a table; its back-quotes stay."""
    return html.escape(" ".join((text or "").split()), quote=False).replace("|", "\\|").replace("[", "\\[")


if __name__ == "__main__":
    import typer

    from prism_nemo.cli import app

    Path(sys.argv[1]).write_text(reference(typer.main.get_command(app)))
