"""A diagnosis as people read it, within 100 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prism_nemo.runtime.doctor import Diagnosis, Item

MIN_WIDTH = 100
_STYLES = {"found": "green", "missing": "dim", "wrong": "red", "broken": "red"}


def doctor_view(diagnosis: Diagnosis) -> RenderableType:
    """Machine, what was found, which kernels follow, and what to install."""
    parts: list[RenderableType] = [_machine(diagnosis)]
    parts += [Text("\nWhat was found", "bold"), _items(diagnosis.items)]
    parts += [Text("\nWhat each part uses here", "bold"), _kernels(diagnosis)]
    parts += [Text(f"\nFP8: {diagnosis.fp8}")]
    if diagnosis.missing:
        parts += [Text("\nMissing here", "bold"), _missing(diagnosis.missing)]
    else:
        parts += [Text("\nNothing that this machine would use is missing.", "green")]
    return Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_header=bool(columns))
    for column in columns:
        table.add_column(column)
    return table


def _machine(diagnosis: Diagnosis) -> RenderableType:
    table = _table()
    for name, value in diagnosis.machine.items():
        table.add_row(Text(name, "bold"), Text(value))
    for number, device in enumerate(diagnosis.devices):
        recipes = ", ".join(device.fp8_recipes) or "none"
        capability = f"compute capability {device.capability}, FP8 recipes {recipes}"
        table.add_row(Text(f"GPU {number}", "bold"), f"{device.name}, {device.memory_gib} GiB, {capability}")
    if not diagnosis.devices:
        table.add_row(Text("GPU", "bold"), "none that torch can use: everything runs on the CPU")
    return table


def _items(items: list[Item]) -> RenderableType:
    table = _table()
    for item in items:
        status = Text(" ".join(filter(None, (item.status, item.version))), _STYLES[item.status], no_wrap=True)
        table.add_row(Text(item.name, no_wrap=True), status, item.use, Text(item.decided_by, "dim", overflow="fold"))
    return table


def _kernels(diagnosis: Diagnosis) -> RenderableType:
    table = _table("", "kernel", "because")
    for kernel in diagnosis.kernels:
        table.add_row(kernel.part, kernel.kernel, Text(kernel.because, "dim"))
    return table


def _missing(items: list[Item]) -> RenderableType:
    table = _table()
    for item in items:
        lines = f"{item.problem}\n{item.install}" if item.problem else item.install
        # Text, not str: rich would read the brackets of prism-nemo[gpu] as markup.
        table.add_row(Text(item.name, _STYLES[item.status], no_wrap=True), Text(lines))
    return table
