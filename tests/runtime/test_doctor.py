"""`prism-nemo doctor`: true on this machine, never fails, and says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

from prism_nemo.runtime.doctor import Device, Diagnosis, Item, kernels
from prism_nemo.runtime.doctor_view import MIN_WIDTH, doctor_view


def doctor(path: Path | None = None, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", "prism_nemo", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=180)


def test_beside_broken_and_wrong_packages(tmp_path: Path) -> None:
    """The empty Transformer Engine keeps Megatron-Core from being imported, yet the doctor speaks, and names both."""
    for name, text in (
        ("transformer_engine", 'raise RuntimeError("Found empty `transformer-engine` meta package")'),
        ("apex", ""),
        ("wandb", "import os; os.abort()"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text("#!/bin/sh\necho slurm-wlm 22.05.8\n")
    (tools / "bwrap").write_text("#!/bin/sh\nexit 3\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    result = doctor(tmp_path, "--json", PATH=f"{tools}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    found = json.loads(result.stdout)
    items = {item["name"]: item for item in found["items"]}
    assert {name: items[name]["status"] for name in ("Megatron-Core", "Transformer Engine", "Apex")} == {
        "Megatron-Core": "broken",
        "Transformer Engine": "broken",
        "Apex": "wrong",
    }
    assert items["Weights & Biases"]["status"] == "broken"
    assert "Transformer Engine" in items["Megatron-Core"]["install"]
    assert items["Transformer Engine"]["install"].startswith("pip uninstall transformer-engine")
    assert items["Apex"]["install"].startswith("pip uninstall apex")
    assert items["Apex"]["decided_by"] == "apex.optimizers.FusedAdam"
    assert (items["Slurm"]["status"], items["Slurm"]["version"]) == ("found", "22.05.8")
    assert items["bubblewrap"]["status"] == "broken"
    assert {"Megatron-Core", "Transformer Engine", "Apex", "Weights & Biases", "bubblewrap"} <= set(found["missing"])
    assert "Slurm" not in found["missing"]


def test_the_empty_package_is_named_by_other_commands_too(tmp_path: Path) -> None:
    """Megatron-Core's import ends in RuntimeError: people get its message and where to look, not a traceback."""
    (tmp_path / "transformer_engine").mkdir()
    text = 'raise RuntimeError("Found empty `transformer-engine` meta package installed")'
    (tmp_path / "transformer_engine" / "__init__.py").write_text(text)
    command = [sys.executable, "-m", "prism_nemo", "midtrain", "recipe.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert result.returncode == 2
    assert result.stderr.endswith("meta package installed; see: prism-nemo doctor\n")
    assert "Traceback" not in result.stderr


def by_part(cuda: bool, *usable: str) -> dict[str, str]:
    return {kernel.part: kernel.kernel for kernel in kernels(cuda, set(usable))}


def test_which_kernel_follows_from_what() -> None:
    cpu, bare = by_part(False), by_part(True)
    assert cpu == bare
    assert cpu["attention"] == "torch SDPA"
    assert cpu["optimizer"] == "torch's fused AdamW"
    te = by_part(True, "Transformer Engine", "Apex", "mamba_ssm")
    for part in ("attention", "norm", "linear", "optimizer", "gradient clipping"):
        assert te[part].startswith("Transformer Engine"), part
    assert te["attention of hybrids"] == "torch SDPA"
    assert te["SSD scan"].startswith("mamba_ssm")
    assert te["convolution"] == "torch"
    apex = by_part(True, "Apex", "causal_conv1d")
    assert apex["optimizer"] == "Apex's FusedAdam"
    assert apex["linear"] == bare["linear"]
    assert apex["convolution"].startswith("causal_conv1d")


def test_view_fits_and_keeps_brackets() -> None:
    """rich takes [gpu] for markup and drops it, which would tell people to install something else."""
    item = Item(
        "Transformer Engine", "missing", None, "transformer_engine.pytorch.Linear", "layers", None,
        "pip install 'prism-nemo[gpu]'", wanted=True,
    )  # fmt: skip
    device = Device("NVIDIA H100", 79.6, "9.0", ["delayed", "tensorwise", "blockwise"])
    diagnosis = Diagnosis({"python": "3.11"}, [device], [item], kernels(True, set()), "FP8 [x]")
    out = StringIO()
    Console(file=out, width=MIN_WIDTH).print(doctor_view(diagnosis))
    text = out.getvalue()
    assert "pip install 'prism-nemo[gpu]'" in text
    assert "H100, 79.6 GiB, compute capability 9.0" in text
    assert "FP8 [x]" in text
    assert max(map(len, text.splitlines())) <= MIN_WIDTH
    assert "Nothing that this machine would use is missing" not in text
