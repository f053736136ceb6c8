"""Against the real NeMo 2.7.3, in a process of its own: it loads what is written here, and what it saves is read here.

Slow, and skipped where NeMo is not installed: ``make nemo-toolkit`` does, and PRISM_NEMO_TOOLKIT names the folders.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo_layouts import RECORDED
from tiny_llama import LLAMA3
from tiny_models import hf_model, save_tiny

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.nemo.reading import import_nemo
from prism_nemo.checkpoint.nemo.writing import export_nemo
from prism_nemo.checkpoint.verification import verify
from prism_nemo.config import ParallelConfig

TOOLKIT = os.environ.get("PRISM_NEMO_TOOLKIT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOOLKIT, reason="NeMo is not installed (make nemo-toolkit; PRISM_NEMO_TOOLKIT names it)"),
]
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "LlamaConfig"),
    "tied": ("llama-tied", {}, "LlamaConfig"),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}, "Llama31Config"),
    "mistral": ("mistral", {}, "MistralConfig7B"),
}


def in_nemo(checkpoint: Path, result: Path, again: Path) -> dict[str, Any]:
    """What NeMo says of a checkpoint; it adds logits to `result` and saves to `again`."""
    peer = Path(__file__).with_name("nemo_peer.py")
    path = os.pathsep.join([TOOLKIT, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(peer), str(checkpoint), str(result), str(again)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines = [line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("CONFIG ", "TOKENIZER "))]
    return {kind: json.loads(text) for kind, text in lines}


@pytest.mark.parametrize("name", MODELS)
def test_nemo_computes_the_same_function_and_its_save_is_read(name: str, tmp_path: Path) -> None:
    case, changes, config_class = MODELS[name]
    save_tiny(case, tmp_path / "hf", **changes)
    import_hf(tmp_path / "hf", tmp_path / "native", ParallelConfig())
    export_nemo(tmp_path / "native", tmp_path / "nemo", RECORDED / "llama31" / "nemo_tokenizer")
    tokens = torch.randint(0, 149, (2, 64), generator=torch.Generator().manual_seed(1))
    torch.save({"tokens": tokens}, tmp_path / "result.pt")
    said = in_nemo(tmp_path / "nemo", tmp_path / "result.pt", tmp_path / "again")
    assert (said["CONFIG"]["class"], said["CONFIG"]["vocab_size"]) == (config_class, 149)
    assert said["TOKENIZER"] == [11, [3, 5, 4]]
    with torch.no_grad():
        expected = hf_model(tmp_path / "hf")(tokens).logits
    logits = torch.load(tmp_path / "result.pt")["logits"]
    assert (logits - expected).abs().max() < 1e-4 * expected.std()
    import_nemo(tmp_path / "again", tmp_path / "back")
    assert verify(tmp_path / "hf", tmp_path / "back", ParallelConfig()).passed
