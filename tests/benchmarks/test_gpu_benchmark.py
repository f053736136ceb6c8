"""The arithmetic of benchmarks/gpu.py, which no machine without a GPU measures anything with."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prism_nemo.config import ParallelConfig, RecomputeConfig
from prism_nemo.errors import InputError
from prism_nemo.models.catalog import find
from prism_nemo.models.family import Architecture, architecture_from_hf
from prism_nemo.planning.activations import Kernels
from prism_nemo.planning.hardware import GPUS, Assumptions
from prism_nemo.planning.memory import Workload, estimate_memory
from prism_nemo.runtime import start, stop
from prism_nemo.runtime.launch import launch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 1e4,
}  # fmt: skip


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{SCRIPT} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(layers: int) -> Architecture:
    return architecture_from_hf(TINY | {"num_hidden_layers": layers}, "test")


def two_steps() -> tuple[list[float], int, float]:
    runtime = start(ParallelConfig(), seed=0)
    found = script().steps_of(tiny(2), runtime, Workload(64, 1, 2), 2, RecomputeConfig())
    stop()
    return found  # type: ignore[no-any-return]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_claimed() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not done.stdout.strip()


def test_the_step_is_the_trainers_own() -> None:
    """Random tokens: a loss close to that of guessing, ln 128; the times of the steps asked for."""
    seconds, peak, loss = launch(two_steps)
    assert len(seconds) == 2
    assert peak == 0
    assert loss == pytest.approx(math.log(128), rel=0.2)


def test_mfu_by_hand() -> None:
    """2 rows of 64 tokens in 0.5 s; forward, per token: 2 * weights, and 4 * 32 FLOPs for each of 65 / 2 keys."""
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64  # q and o, k and v, gate up down
    per_token = 3 * (2 * (2 * layer + 32 * 128) + 2 * 4 * 32 * 65 / 2)
    gpu = GPUS["h100"]
    lines = script().figures(
        tiny(2), gpu, Workload(64, 1, 2), Kernels.named("te"), Assumptions(), [0.5, 0.4, 0.6], 2_000_000_000
    )
    mfu = lines[0]
    # The figure is rounded to four digits for people; a model this small has a share of 1e-11.
    assert mfu["tokens_per_second"] == 256.0
    assert mfu["target"] == 0.5
    assert mfu["pass"] is False
    assert script().model_flops_utilisation(tiny(2), 64, 256.0, 1, gpu.bf16_flops) == pytest.approx(
        per_token * 256 / 989e12, rel=1e-12
    )
    assert lines[1]["ours"] == 2.0
    fast = script().figures(
        find("llama-3.1-8b").architecture, gpu, Workload(8192, 1, 4), Kernels.named("te"), Assumptions(), [3.0], 1
    )[0]
    assert fast["ours"] == pytest.approx(fast["tokens_per_second"] * 6 * 8.03e9 * 1.1 / 989e12, rel=0.05)
    assert fast["pass"] is (fast["ours"] >= 0.5)


def test_fp8_has_no_bf16_target_and_says_its_own_share() -> None:
    kernels = Kernels.on_gpu(tiny(2), "delayed")
    line = script().figures(tiny(2), GPUS["h100"], Workload(64, 1, 2), kernels, Assumptions(), [1e-9], 1)[0]
    assert line["target"] is None
    assert line["share_of_fp8_peak"] == pytest.approx(line["ours"] * 989 / 1979, abs=2e-3)


def test_the_slice_is_the_largest_that_fits() -> None:
    module, whole, work = script(), find("llama-3.1-8b").architecture, Workload(8192, 1, 4)
    kernels, assumed = Kernels.on_gpu(whole), Assumptions()
    layers = module.layers_that_fit(whole, GPUS["h100"], work, kernels, assumed)

    def need(count: int) -> float:
        return estimate_memory(module.slice_of(whole, count), ParallelConfig(), work, kernels, assumed, 0).total

    assert 1 <= layers < whole.num_layers
    assert need(layers) <= GPUS["h100"].memory_bytes < need(layers + 1)
    hybrid = find("nemotron-h-8b").architecture
    part = module.slice_of(hybrid, 7)
    assert part.layer_pattern == hybrid.layer_pattern[:7]
    with pytest.raises(InputError, match="--layers 33"):
        module.slice_of(whole, 33)


def test_the_card_is_recognised_or_refused() -> None:
    module = script()
    card = module.card_of("NVIDIA H100 80GB HBM3", 85_000_000_000)
    assert (card.name, card.memory_bytes) == ("h100", 85e9)
    with pytest.raises(InputError, match="is not in"):
        module.card_of("NVIDIA L4", 1)
