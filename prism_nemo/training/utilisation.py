"""How much of the machine a run uses: FLOP/s, their share of the card's peak, memory."""

from __future__ import annotations

import resource

import torch

from prism_nemo.planning.hardware import GPUS


def utilisation(flops_per_second: float, device: torch.device) -> dict[str, float]:
    """The model's own FLOP/s of one process, and MFU where the card's peak is known.

    Args:
        flops_per_second: Of the model (`planning.flops.training_flops`), divided by the number of processes.
        device: Of this process.

    Returns:
        ``tflops`` and, on a card of `planning.hardware`, ``mfu`` as a share of its dense BF16 peak.
    """
    values = {"tflops": flops_per_second / 1e12}
    peak = bf16_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is not None:
        values["mfu"] = flops_per_second / peak
    return values


def bf16_peak(card: str) -> float | None:
    """Dense BF16 peak of a card by the name that its driver gives, such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    words = card.lower().replace("-", " ").split()
    return next((gpu.bf16_flops for gpu in GPUS.values() if gpu.name in words), None)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory that this process has held, in 10^9 bytes: what the card's allocator took, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
