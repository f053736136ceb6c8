"""The RL stage with rollouts by the stand-in for vLLM, and what goes wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_in"))

import rl_workers
import vllm

from prism_nemo.config import RLConfig
from prism_nemo.generation import vllm as module
from prism_nemo.generation.vllm import VLLMEngine

torch.set_num_threads(1)


def _pretend_gpus() -> None:
    module.capability = lambda: (9, 0)


def train(config: RLConfig) -> dict[str, Any]:
    """As it is."""
    _pretend_gpus()
    return rl_workers.train(config)


def train_on_an_old_graph(config: RLConfig) -> dict[str, Any]:
    """vLLM's parameters are updated, but it goes on to compute with the first ones: no look at them can tell."""
    _pretend_gpus()
    vllm.faults.add("old graph")
    return rl_workers.train(config)


def train_without_the_first_refit(config: RLConfig) -> dict[str, Any]:
    """A refit that does nothing and says nothing."""
    _pretend_gpus()

    def refit(self: VLLMEngine, model: Any) -> None:
        self._fresh = True

    VLLMEngine.refit = refit  # type: ignore[method-assign]
    return rl_workers.train(config)
