"""What changes when a CUDA device is present: NCCL, the local device, Transformer Engine."""

from __future__ import annotations

import importlib.util
import os

import torch


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported (its presence is not enough without a CUDA device)."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def select_device() -> torch.device:
    """Bind this process to the GPU that torchrun's LOCAL_RANK names.

    Returns:
        The CUDA device of this process.
    """
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
