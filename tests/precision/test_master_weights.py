"""bf16 weights with fp32 masters: updates that bf16 cannot hold are collected, and are lost without the masters."""

from __future__ import annotations

from pathlib import Path

from precision_workers import master_weights
from tiny_llama import save_tiny_llama

from prism_nemo.runtime.launch import launch


def test_updates_below_half_an_ulp_are_collected(tmp_path: Path) -> None:
    """Weights between 2^-5 and 2^-3 have a bf16 spacing of at least 2^-12 = 2.4e-4; a step moves them by at most about
    the learning rate, 2e-5, a sixth of half of that. Forty steps of steady sign make 8e-4."""
    hf = save_tiny_llama(tmp_path / "hf")
    kept, lost = (launch(master_weights, str(hf), 40, 2e-5, keep) for keep in (True, False))
    for found in (kept, lost):
        assert found["types"] == {"torch.bfloat16"}
        assert found["gradient_types"] == {"torch.float32"}
        assert found["master_type"] == "torch.float32"
        assert found["watched"] > 300
    assert kept["master_moved"] > 2.0**-12
    assert kept["changed"] > 0.5
    assert kept["weights_are_rounded_masters"]
    assert lost["changed"] == 0.0
    assert lost["master_moved"] < 2.5e-5
