"""The scripts of `conversion/`, run by path: alone, and under torchrun, where no process may be started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_llama import all_tensors

CONVERSION = Path(__file__).parent.parent.parent / "conversion"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "127.0.0.1:0"]


def run(script: str, *arguments: object, torchrun: bool = False, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = TORCHRUN if torchrun else [sys.executable]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*command, str(CONVERSION / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=cwd,
    )


@pytest.mark.parametrize("torchrun", [False, True], ids=["alone", "torchrun"])
def test_there_and_back(tied_hf: Path, tmp_path: Path, torchrun: bool) -> None:
    layout = ["--tp", 2] if torchrun else []
    native, back, card = tmp_path / "native", tmp_path / "back", tmp_path / "cards/tied.yaml"
    result = run("hf_to_megatron.py", tied_hf, "--out", native, *layout, torchrun=torchrun, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("imported from") == 1
    assert len(list(native.glob("*.distcp"))) == (2 if torchrun else 1)
    result = run(
        "megatron_to_hf.py", native, "--out", back, "--max-shard-size", "50KB", torchrun=torchrun, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("exported from") == 1
    before, after = all_tensors(tied_hf), all_tensors(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    result = run("verify.py", back, native, *layout, "--json", "--card", card, torchrun=torchrun, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["passed"] is True
    entries = yaml.safe_load(card.read_text())["verified"]
    assert f"logits at TP {2 if torchrun else 1}, PP 1" in entries
    assert str(tmp_path) not in card.read_text()


def test_wrong_input_under_torchrun(tied_hf: Path, tmp_path: Path) -> None:
    """Spare processes would wait for ever; a layout that needs more than there are is refused by all."""
    result = run("hf_to_megatron.py", tied_hf, "--out", tmp_path / "x", "--pp", 4, torchrun=True, cwd=tmp_path)
    assert result.returncode != 0
    assert "--tp 1 --pp 4 needs a multiple of 4 processes, but 2 were started" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_spare_processes_are_harmless(tied_hf: Path, tmp_path: Path) -> None:
    result = run("hf_to_megatron.py", tied_hf, "--out", tmp_path / "x", torchrun=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
