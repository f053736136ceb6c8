"""Every family against transformers: logits and every gradient, in every layout; and that a mistake would show.

Two correct fp32 implementations differ by rounding: each logit passes through some dozens of sums of 50 to 100
products, so a few times 1e-7 relative to the logits' standard deviation at one layer, up to 1e-5 after all of them. A
dropped scalar or a swapped mapping shows at 1e-2 and above.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parity_workers import compare, compare_changed, isolation, logits_with_mistakes
from tiny_models import CASES, save_tiny

from prism_nemo.config import ParallelConfig
from prism_nemo.models.family import Mamba, Rope, read_hf_config
from prism_nemo.runtime.launch import launch

LOGITS, GRADIENTS = 1e-5, 1e-4
VISIBLE = 1e-3


# A layout of one process, of two, and of four.
LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(2),
    # The row is cut over the ranks, so the gradients of its norms are sums over them.
    "tp2-sp": ParallelConfig(2, sequence_parallel=True),
    "pp2": ParallelConfig(1, 2),
}


def check(folder: Path, layout: ParallelConfig) -> None:
    length = 52 if layout.sequence_parallel else 51
    logits, gradients, _ = launch(compare, str(folder), layout, None, length, processes=layout.world_size)
    assert logits <= LOGITS
    assert gradients <= GRADIENTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient(case: str, layout: str, tmp_path: Path) -> None:
    check(save_tiny(case, tmp_path / "hf"), LAYOUTS[layout])


@pytest.mark.parametrize("case", ["llama", "mistral-window", "granite-4", "granite-hybrid", "nemotron-h"])
def test_four_processes(case: str, tmp_path: Path) -> None:
    check(save_tiny(case, tmp_path / "hf"), ParallelConfig(2, 2))


@pytest.mark.parametrize("case", ["granite", "granite-4", "granite-hybrid"])
@pytest.mark.parametrize("scalar", ["embedding_multiplier", "residual_multiplier", "attention_multiplier"])
def test_a_dropped_granite_scalar_shows(case: str, scalar: str, tmp_path: Path) -> None:
    default = None if scalar == "attention_multiplier" else 1.0
    folder = save_tiny(case, tmp_path / "hf")
    ((logits, gradients),) = launch(compare_changed, str(folder), [{scalar: default}])
    assert logits > VISIBLE
    assert gradients > VISIBLE


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("granite", {"logits_scaling": 1.0}),
        ("granite-4", {"logits_scaling": 1.0}),
        ("granite-hybrid", {"logits_scaling": 1.0}),
        ("granite-4", {"rope": None}),
        ("granite-hybrid", {"rope": Rope(theta=100.0)}),
        ("mistral-window", {"sliding_window": None}),
        ("mistral-window", {"sliding_window": 8}),  # the count that includes the token, taken as one that does not
        ("mistral-window", {"sliding_window": 6}),
        ("llama", {"norm_epsilon": 1e-2}),
        ("nemotron-h", {"dt_limit": (0.001, float("inf"))}),
        ("granite-hybrid", {"dt_limit": (0.0, 0.05)}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_another_function_shows(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny(case, tmp_path / "hf")
    mamba = read_hf_config(folder).mamba
    if "dt_limit" in change:
        assert isinstance(mamba, Mamba)
        change = {"mamba": Mamba(**{**vars(mamba), **change})}
    ((logits, _),) = launch(compare_changed, str(folder), [change])
    assert logits > VISIBLE


MISTAKES: dict[str, set[str]] = {
    "none": set(),
    "key and value": {"dense", "granite_hybrid", "nemotron_h"},
    "gate and up": {"dense", "granite_hybrid"},
    "the two norms": {"dense", "granite_hybrid"},
    "the order of layers": {"dense", "granite_hybrid", "nemotron_h"},
    "z and x": {"granite_hybrid", "nemotron_h"},
    "B and C": {"granite_hybrid", "nemotron_h"},
    "convolutions of B and C": {"granite_hybrid", "nemotron_h"},
    "A_log and dt_bias": {"granite_hybrid", "nemotron_h"},
    "D and dt_bias": {"granite_hybrid", "nemotron_h"},
}


@pytest.mark.parametrize("case", ["llama", "mistral-window", "granite", "granite-4", "granite-hybrid", "nemotron-h"])
def test_a_swapped_mapping_shows(case: str, tmp_path: Path) -> None:
    """None of these mistakes changes a shape; a round trip would see none of them."""
    folder = save_tiny(case, tmp_path / "hf")
    architecture = read_hf_config(folder)
    kind = architecture.family if architecture.mamba is not None else "dense"
    found = launch(logits_with_mistakes, str(folder), list(MISTAKES))
    for mistake, kinds in MISTAKES.items():
        difference = found[mistake]
        if kind in kinds:
            assert difference is not None, mistake
            assert difference > VISIBLE, mistake
        else:
            assert difference is None, mistake


LENGTHS = [7, 16, 1, 23, 9]  # shorter and longer than windows and chunks, odd, and a document of one token


@pytest.mark.parametrize("case", ["llama", "mistral-window", "granite", "granite-4", "granite-hybrid", "nemotron-h"])
@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(2)], ids=["tp1", "tp2"])
def test_packed_documents_do_not_see_each_other(case: str, parallel: ParallelConfig, tmp_path: Path) -> None:
    folder = save_tiny(case, tmp_path / "hf")
    leak, alone, unpacked = launch(isolation, str(folder), parallel, LENGTHS, processes=parallel.world_size)
    assert leak == 0
    assert alone <= LOGITS
    assert unpacked > VISIBLE
