"""Machines as data, and the layout of a model on each. The study does not state its layout; these are ours."""

from __future__ import annotations

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from recipes.layouts import Row, find_row
from recipes.machine import Machine
from recipes.provenance import Values, ours

HARDWARE = {
    "cpu": Machine(None, 1, 1),
    "cpu2": Machine(None, 1, 2),
    "h100x8": Machine("h100", 1, 8),
    "h100x64": Machine("h100", 8, 8),
    "h100x16": Machine("h100", 2, 8),
    "h100x32": Machine("h100", 4, 8),
    "h100x128": Machine("h100", 16, 8),  # as many as the study's mid-training has ranks (Table 16: 8 x 16)
    "h100x144": Machine("h100", 18, 8),  # as many as its long-context phase has (Table 17: 4 x 4 x 9)
    "a100x64": Machine("a100", 8, 8),
    "h200x8": Machine("h200", 1, 8),
    "h200x64": Machine("h200", 8, 8),
    "b200x8": Machine("b200", 1, 8),
    "b200x64": Machine("b200", 8, 8),
}


def find_machine(hardware: str) -> Machine:
    """The machine of that name.

    Raises:
        InputError: If there is none; lists those there are.
    """
    if hardware not in HARDWARE:
        raise InputError(f"hardware '{hardware}' is unknown; choose one of {', '.join(HARDWARE)}")
    return HARDWARE[hardware]


def layout_values(hardware: str, model: str = "", use: str = "8k") -> Values:
    """Fields ``parallel.*`` and ``recompute.granularity``, with their reasons.

    Args:
        hardware: A name of `HARDWARE`.
        model: Of the catalog; empty for a layout that fits all of them.
        use: What the memory is needed for: see `recipes.layouts`.

    Raises:
        InputError: For a name that is unknown, or a use that has no layout on so many GPUs.
    """
    machine = find_machine(hardware)
    if machine.gpu is None:
        layout, recompute, why = ParallelConfig(data_parallel_size=machine.processes), "none", "one rank per process"
    else:
        row = find_row(machine.gpu, machine.processes, model, use)
        layout, recompute, why = _parallel(row, machine), row.recompute, f"{row.why}; checked by prism_nemo.planning"
    reason = f"{hardware}: {why}"
    values: Values = {
        f"parallel.{name}": ours(getattr(layout, name), reason)
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "data_parallel_size",
            "sequence_parallel",
        )
    }
    values["recompute.granularity"] = ours(recompute, reason)
    return values


def layout_of(hardware: str, model: str = "", use: str = "8k") -> ParallelConfig:
    """The layout for a name; see `layout_values`.

    Raises:
        InputError: If there is none; lists those there are.
    """
    values = layout_values(hardware, model, use)
    return ParallelConfig(
        **{key.partition(".")[2]: value.value for key, value in values.items() if key.startswith("parallel.")}
    )


def _parallel(row: Row, machine: Machine) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=row.tp,
        pipeline_model_parallel_size=row.pp,
        context_parallel_size=row.cp,
        data_parallel_size=machine.processes // (row.tp * row.pp * row.cp),
        sequence_parallel=row.tp > 1,  # shares activations that tensor parallelism would keep on every rank
    )
