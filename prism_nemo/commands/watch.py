"""`prism-nemo watch`: a live page of a running stage, or the same in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prism_nemo.commands.printing import say
from prism_nemo.errors import InputError


def watch(
    run: Annotated[Path, typer.Argument(help="Run directory, or a folder of such; it may still be empty.")],
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Where to listen; the next free one if it is taken.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; another lets the network read the run.")
    ] = "127.0.0.1",
    tui: Annotated[bool, typer.Option("--tui", help="In this terminal, without a page.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: as JSON.")] = False,
) -> None:
    """A live page of a running stage: steps, curves, speed, checkpoints, the latest rollouts. It only reads."""
    from rich.console import Console

    from prism_nemo.watch.state import Watched

    if as_json and not once:
        raise InputError("--json prints one look: give --once as well")
    watched = Watched(run)
    if once:
        if as_json:
            typer.echo(json.dumps(watched.look()))
        else:
            from prism_nemo.watch.terminal import frame

            Console(highlight=False).print(frame(watched.look()))
        return
    try:
        if tui:
            from prism_nemo.watch.terminal import watch_in_terminal

            watch_in_terminal(watched, Console(highlight=False))
            return
        from prism_nemo.watch.server import PORT, is_local, make_server

        server = make_server(watched, host, PORT if port is None else port)
        if not is_local(host):
            say(f"prism-nemo: everybody who reaches {host} can read this run: prompts, answers, numbers")
        shown = f"[{host}]" if ":" in host else host
        say(f"prism-nemo: watching {run} at http://{shown}:{server.server_port}/ (Ctrl-C ends it)")
        with server:
            server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        say("")
