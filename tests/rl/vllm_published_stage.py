"""The RL stage with rollouts by the published vLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))

import rl_workers
import torch
import vllm_published

from prism_nemo.config import RLConfig
from prism_nemo.generation import vllm as module


def train(config: RLConfig) -> dict[str, Any]:
    """As it is, but for the check that there are GPUs."""
    torch.set_num_threads(1)
    vllm_published.use()
    module.capability = lambda: (9, 0)
    return rl_workers.train(config)
