"""How much memory this process may still take."""

from __future__ import annotations

import os

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that are free for this process: of its GPU, or its share of the machine's memory on CPU.

    What torch has reserved on a GPU and does not use counts as free. On CPU the processes of a run that share the
    machine (torchrun's LOCAL_WORLD_SIZE, else all of them) share what is available.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return int(psutil.virtual_memory().available) // max(1, processes)
