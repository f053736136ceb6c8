"""The layers of a GPU run, with a stand-in for Transformer Engine: those of a CPU run, and transformers' model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny

from prism_nemo.config import ParallelConfig, RecomputeConfig

PROGRAM = Path(__file__).with_name("transformer_engine_layers.py")
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CHANGES: dict[str, dict[str, Any]] = {"llama": {"rope_parameters": LLAMA_3}}


def run(
    cases: list[str], parallel: ParallelConfig, recompute: RecomputeConfig, folder: Path, **environment: str
) -> dict[str, Any]:
    """See `transformer_engine_layers.compare`, by case."""
    request = {
        "cases": {case: str(save_tiny(case, folder / case, **CHANGES.get(case, {}))) for case in cases},
        "parallel": asdict(parallel),
        "recompute": asdict(recompute),
        "out": str(folder / "found.json"),
    }
    (folder / "request.json").write_text(json.dumps(request))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={parallel.world_size}"]
    command = [sys.executable, *torchrun * (parallel.world_size > 1), str(PROGRAM), str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


FULL, PARTS = RecomputeConfig("full"), RecomputeConfig("selective", modules=["core_attn", "mlp"])


@pytest.mark.parametrize(
    ("cases", "parallel", "recompute"),
    [
        (["llama", "mistral-window", "granite-4"], ParallelConfig(), RecomputeConfig()),
        (["granite"], ParallelConfig(2, sequence_parallel=True), RecomputeConfig()),
        (["llama-tied"], ParallelConfig(1, 2), FULL),
        (["mistral-window"], ParallelConfig(context_parallel_size=2), RecomputeConfig()),
        (["granite"], ParallelConfig(1, 1, 2, overlap_grad_reduce=True, overlap_param_gather=True), PARTS),
    ],
    ids=["TP1", "TP2-SP", "PP2-recompute-full", "CP2", "DP2-overlap-recompute-selective"],
)
def test_they_are_the_same_model(
    cases: list[str], parallel: ParallelConfig, recompute: RecomputeConfig, tmp_path: Path
) -> None:
    """Logits of transformers; losses, gradient norms and weights of the other layers over three updates on packed rows.

    In fp32: what differs is the order of sums, which three updates of 1e-3 make 1e-6 of.
    """
    for case, found in run(cases, parallel, recompute, tmp_path).items():
        layers = 4 // parallel.pipeline_model_parallel_size
        assert found["layers"] == 2 * layers, case
        assert found["attention"] == (layers if parallel.context_parallel_size == 1 else 0), case
        assert found["local layers"] == 0
        assert found["optimizer"] == "FusedAdam"
        assert found.get("from transformers", 0.0) < 1e-4, case
        if "written" in found:
            (tokens, numbers), (expected, others) = found["written"]["te"], found["written"]["local"]
            assert tokens == expected, case
            assert numbers == pytest.approx(others, abs=1e-4), case
        assert found["steps"]["te"] == pytest.approx(found["steps"]["local"], rel=1e-5), case
        assert found["weights"] < 1e-5, case
        assert found["other keys"] == [], case
        for kind, other in (("te", "local"), ("local", "te")):
            assert found[f"{other} loaded into {kind}"] == pytest.approx(found[f"{other} goes on"], rel=1e-5), case


def test_its_optimizer_is_torchs_adamw(tmp_path: Path) -> None:
    """The same updates, by an optimizer that counts its steps by group and is saved and loaded on other ways."""
    steps = {}
    for name, environment in (("FusedAdam", {}), ("AdamW", {"STAND_IN_WITHOUT_OPTIMIZERS": "1"})):
        (tmp_path / name).mkdir()
        found = run(["llama"], ParallelConfig(), RecomputeConfig(), tmp_path / name, **environment)["llama"]
        assert found["optimizer"] == name
        steps[name] = [*found["steps"]["te"], *found["local loaded into te"]]
    assert steps["FusedAdam"] == pytest.approx(steps["AdamW"], rel=1e-5)
