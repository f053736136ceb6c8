"""What changes when a CUDA device is present: NCCL, the local device, Transformer Engine."""

from __future__ import annotations

import functools
import os

import torch

from prism_nemo.runtime.detect import TRANSFORMER_ENGINE, load


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used: there is a CUDA device, and the layers can be imported."""
    return torch.cuda.is_available() and load(TRANSFORMER_ENGINE) is not None


def capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU, (9, 0) for an H100; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def select_device() -> torch.device:
    """Bind this process to the GPU that torchrun's LOCAL_RANK names.

    Returns:
        The CUDA device of this process.
    """
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
