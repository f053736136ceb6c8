"""Our recurrence and convolution against the published kernels that a GPU run uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from prism_nemo.models.layers import mamba_kernels
from prism_nemo.models.layers.causal_conv import causal_conv
from prism_nemo.models.layers.ssd import ssd_scan

# A folder of packages made by `pip install --target`: with triton (1 GB) in it, it is nothing to have in every venv.
KERNELS = os.environ.get("PRISM_NEMO_KERNELS", "")
GRADIENTS = {"dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias"}


@pytest.mark.slow
def test_scan_is_that_of_the_published_kernels() -> None:
    """mamba_ssm's Triton kernels, run on the CPU by Triton's interpreter through the code that runs them on a GPU."""
    missing = [
        name for name in ("triton", "mamba_ssm", "einops") if not PathFinder.find_spec(name, [KERNELS, *sys.path])
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (PRISM_NEMO_KERNELS may name a folder that has them)")
    script = Path(__file__).with_name("mamba_interpreted.py")
    path = os.pathsep.join(p for p in (KERNELS, os.environ.get("PYTHONPATH", "")) if p)
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    differences = json.loads(run.stdout.splitlines()[-1])
    control = differences.pop("control")
    for case, values in differences.items():
        assert values.keys() == GRADIENTS | {"y"}
        for name, value in values.items():
            assert value < 1e-5, f"{case}: {name} differs by {value} of its largest entry"
    # Documents matter to all but D, in this example too.
    assert all(control[name] > 1e-2 for name in control if name != "dD")


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
def test_published_kernels_on_a_device(documents: bool) -> None:
    """The kernels multiply fp32 in tf32, ours in fp32: equal to tf32's ten bits."""
    pytest.importorskip("mamba_ssm")
    pytest.importorskip("causal_conv1d")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    b, length, h, p, g, n = 2, 200, 4, 64, 2, 64
    seq_idx = None
    if documents:
        seq_idx = (torch.arange(length, device="cuda") // 70).to(torch.int32).expand(b, -1).contiguous()
    xBC, kernel, bias = (
        normal(b, length, h * p + 2 * g * n),
        normal(h * p + 2 * g * n, 1, 4) / 2,
        normal(h * p + 2 * g * n),
    )
    conv_inputs = [t.requires_grad_() for t in (xBC, kernel, bias)]
    results = []
    for function in (
        lambda x, w, c: mamba_kernels.conv(x, w, c, seq_idx),
        lambda x, w, c: causal_conv(x, w, c, seq_idx=seq_idx),
    ):
        out = function(*conv_inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), conv_inputs)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * ours.abs().max().item())

    values = {
        "x": normal(b, length, h, p),
        "dt": normal(b, length, h),
        "A": -torch.rand(h, device="cuda", generator=generator) * 4 - 1,
        "B": normal(b, length, g, n) / 8,
        "C": normal(b, length, g, n) / 8,
        "D": torch.rand(h, device="cuda", generator=generator),
        "dt_bias": normal(h) - 2,
    }
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    theirs = mamba_kernels.scan(**leaves, dt_limit=(0.01, 1.0), chunk_size=64, seq_idx=seq_idx)
    assert "MambaChunkScan" in type(theirs.grad_fn).__name__
    dt = mamba_kernels.positive_dt(leaves["dt"], leaves["dt_bias"], (0.01, 1.0))
    rest = [leaves[name] for name in ("A", "B", "C", "D")]
    ours, _ = ssd_scan(leaves["x"], dt, *rest, chunk_size=64, seq_idx=seq_idx)
    weight = normal(b, length, h, p)
    results = [(y, *torch.autograd.grad((y * weight).sum(), list(leaves.values()))) for y in (theirs, ours)]
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-2, atol=5e-3 * c.abs().max().item())
