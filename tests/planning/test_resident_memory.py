"""What a whole process takes beside what is predicted, once the C library's heap is left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import CASES

SCRIPT = Path(__file__).parent / "resident_memory.py"
# What a process has besides: modules imported by the first step, torch's kernels and their workspaces.
BESIDE = 60e6
_BOTH = {"vocab_size": 32000, "hidden_size": 512, "max_position_embeddings": 2048, "head_dim": 64}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "nemotron-h": "NemotronHForCausalLM"}
SIZES = {
    "llama": {"intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8},
    "nemotron-h": {
        "intermediate_size": 1408, "hybrid_override_pattern": "M-M-*-M-M-*-", "num_attention_heads": 8,
        "num_key_value_heads": 8, "ssm_state_size": 64, "mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 2,
        "conv_kernel": 4, "chunk_size": 128,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("case", ["llama", "nemotron-h"])
def test_resident_memory_is_what_is_predicted(case: str, rows: int, tmp_path: Path) -> None:
    """Within 2 % and what a process has besides. The heap, as it is otherwise, adds 11 to 17 %: see docs/plan.md."""
    cls, values = CASES[case]
    cls(**{**values, **_BOTH, **SIZES[case]}, architectures=[ARCHITECTURES[case]]).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(rows), "1024"],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.98 * found["predicted"] < found["measured"] < 1.02 * found["predicted"] + BESIDE, found
