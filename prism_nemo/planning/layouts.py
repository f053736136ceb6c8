"""Every layout of a number of GPUs, which of them cannot be and why, and the rest ranked by predicted speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from prism_nemo.config import ParallelConfig, RecomputeConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture
from prism_nemo.models.recompute import recompute_fields
from prism_nemo.planning.activations import Kernels
from prism_nemo.planning.flops import RECOMPUTE
from prism_nemo.planning.hardware import GPU, Assumptions
from prism_nemo.planning.memory import RankMemory, Workload, estimate_memory
from prism_nemo.planning.step_time import StepTime, estimate_time
from prism_nemo.precision.check import check_fp8_sizes
from prism_nemo.training.layout import check_batch, check_layout

# Shorter stretches of a row make small products and many small messages; a recipe may ask for them all the same.
LEAST_STRETCH = 4096
# More parts of a stage make the bubble smaller still, and as many times the messages.
MOST_PARTS = 8


@dataclass(frozen=True)
class Candidate:
    """One layout with what is predicted of it.

    Attributes:
        layout: Over processes.
        recompute: "none", "selective" or "full".
        memory: Of the stage that needs most; None where the layout cannot be.
        time: Of a step; None where the layout cannot be.
        refusal: Why it cannot be or does not fit; None if it fits.
    """

    layout: ParallelConfig
    recompute: str
    memory: RankMemory | None = None
    time: StepTime | None = None
    refusal: str | None = None

    def describe(self) -> str:
        """Such as ``TP4 PP2 DP8 SP, recompute full``."""
        return self.layout.describe() + ("" if self.recompute == "none" else f", recompute {self.recompute}")


def model_overrides(recompute: str) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for a mode of recomputation."""
    return recompute_fields(RecomputeConfig(granularity=recompute))


def divisions(gpus: int) -> Iterator[ParallelConfig]:
    """Every way to write a number of GPUs as tensor x pipeline x data, with and without sequence parallelism."""
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp in sizes:
        for pp in sizes:
            if gpus % (tp * pp) == 0:
                for sequence_parallel in (False, True) if tp > 1 else (False,):
                    yield ParallelConfig(tp, pp, gpus // tp // pp, sequence_parallel)


def proposals(a: Architecture, gpus: int, work: Workload) -> Iterator[ParallelConfig]:
    """`divisions`, and each also with context parallelism and virtual pipelines where they can help and the model can
    have them: each rank has `LEAST_STRETCH` tokens of a row or more, each stage up to `MOST_PARTS` parts.
    """
    for layout in divisions(gpus):
        pp, dp = layout.pipeline_model_parallel_size, layout.data_parallel_size
        shares = [n for n in range(1, dp + 1) if dp % n == 0 and (n == 1 or work.seq_length // n >= LEAST_STRETCH)]
        for cp in shares:
            for parts in range(1, MOST_PARTS + 1) if pp > 1 else (1,):
                made = replace(
                    layout,
                    context_parallel_size=cp,
                    virtual_pipeline_model_parallel_size=parts,
                    data_parallel_size=dp // cp,
                )
                if cp == parts == 1 or _model_has(a, made):
                    yield made


def _model_has(a: Architecture, layout: ParallelConfig) -> bool:
    try:
        a.check_layout(
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.context_parallel_size,
            layout.virtual_pipeline_model_parallel_size,
        )
    except InputError:
        return False
    return True


def refusal(a: Architecture, layout: ParallelConfig, work: Workload, fp8_recipe: str | None = None) -> str | None:
    """Why a layout cannot be whatever the memory; None if it can."""
    try:
        check_layout(a, layout, work.distributed_optimizer)
        check_batch(layout, work.seq_length, work.micro_batch_size, work.global_batch_size)
        if fp8_recipe is not None:
            check_fp8_sizes(fp8_recipe, a, layout)
    except InputError as error:
        return str(error)
    return None


def evaluate(
    a: Architecture, layout: ParallelConfig, work: Workload, gpu: GPU, assumed: Assumptions, kernels: Kernels
) -> Candidate:
    """Predict memory and time of one layout."""
    why = refusal(a, layout, work, kernels.fp8_recipe)
    if why is not None:
        return Candidate(layout, work.recompute, refusal=why)
    stages = range(layout.pipeline_model_parallel_size)
    memory = max((estimate_memory(a, layout, work, kernels, assumed, s) for s in stages), key=lambda m: m.total)
    time = estimate_time(a, layout, work, gpu, assumed, kernels)
    found = Candidate(layout, work.recompute, memory, time)
    return found if memory.total <= gpu.memory_bytes else replace(found, refusal=shortage(memory, gpu))


def shortage(memory: RankMemory, gpu: GPU) -> str:
    """The arithmetic of a layout that does not fit."""
    names = (
        "parameters",
        "gradients",
        "optimizer",
        "fp8_weights",
        "activations",
        "logits",
        "communication",
        "working",
        "reserved",
    )
    parts = " + ".join(
        f"{name.replace('_', ' ')} {getattr(memory, name) / 1e9:.1f}" for name in names if getattr(memory, name) >= 5e7
    )
    over = (memory.total - gpu.memory_bytes) / 1e9
    return (
        f"{parts} = {memory.total / 1e9:.1f} GB per rank of stage {memory.stage}, "
        f"{over:.1f} GB more than {gpu.name} has ({gpu.memory_bytes / 1e9:.0f} GB)"
    )


def enumerate_layouts(
    a: Architecture, gpus: int, work: Workload, gpu: GPU, assumed: Assumptions, kernels: Kernels
) -> list[Candidate]:
    """Every layout with every mode of recomputation: first those that fit, the fastest first; then the others."""
    found = [
        evaluate(a, layout, replace(work, recompute=recompute), gpu, assumed, kernels)
        for layout in proposals(a, gpus, work)
        for recompute in RECOMPUTE
    ]
    return sorted(found, key=_order)


def _order(candidate: Candidate) -> tuple[bool, bool, float, int]:
    if candidate.time is None or candidate.memory is None:
        return True, True, 0.0, 0
    # Of equally fast ones, the one with more memory to spare.
    return candidate.refusal is not None, False, round(candidate.time.step, 6), candidate.memory.total
