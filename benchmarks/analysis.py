"""`analyze weights` against a plain numpy loop of the same measures, and against merely reading the files.

    python benchmarks/analysis.py [--json] [--rounds 3] [--gb 4] [--small 1] [--dir /tmp]

Two Llama-shaped bf16 checkpoints are made, the second moved by 1e-3 of the weights' size, and read once, so that they
are in the page cache. A round is, in changing order: ours (all measures but the spectrum, on all cores), numpy (one
tensor after the other: thresholds, equality, distances, signs; without the tenths by magnitude, which would cost it
most), and reading both checkpoints into torch tensors that are reused. Figures are medians over rounds of ratios within
a round. Ours has done a small comparison before: compiling, which is kept on disk, is reported as `compile_seconds`.
Memory is the largest resident set of a process that does nothing else, at two sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

HIDDEN, FFN, VOCABULARY, HEADS, GROUPS = 4096, 11008, 32000, 32, 8
TARGETS = {"numpy": 8.0, "reading": 0.2}
MEMORY_LIMIT_GB = 2.0
THRESHOLDS = (0.1, 0.5, 1, 2, 5, 10)


def make(folder: Path, gb: float, seed: int) -> int:
    """A pair of checkpoints of about this size each, layer by layer in shards; returns the bytes of one."""
    narrow = HIDDEN * GROUPS // HEADS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (narrow, HIDDEN),
        "self_attn.v_proj": (narrow, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
    }  # fmt: skip
    size = 2 * sum(a * b for a, b in layer.values())
    layers = max(1, round((gb * 1e9 - 2 * VOCABULARY * HIDDEN) / size))
    generator = torch.Generator().manual_seed(seed)
    for name in ("before", "after"):
        (folder / name).mkdir(parents=True)
    maps: dict[str, str] = {}
    total = 0
    for i in range(-1, layers):
        shapes = {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if i < 0:
            shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
        file = f"model-{i + 2:05d}-of-{layers + 1:05d}.safetensors"
        before = {n: 0.02 * torch.randn(*shape, generator=generator) for n, shape in shapes.items()}
        after = {n: t + 2e-5 * torch.randn(t.shape, generator=generator) for n, t in before.items()}
        for name, tensors in (("before", before), ("after", after)):
            save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / name / file)
        maps |= dict.fromkeys(shapes, file)
        total += 2 * sum(t.numel() for t in before.values())
    for name in ("before", "after"):
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": maps}))
    return total


def ours(folder: Path) -> dict[str, float]:
    """This project's pass."""
    from prism_nemo.analysis.weights import compare_weights

    total = compare_weights(folder / "before", folder / "after").total
    return {**total.thresholds, "equal": total.equal_fraction, "l2": total.relative_l2 or 0.0}


def numpy_loop(folder: Path) -> dict[str, float]:
    """The same measures, as one would write them down."""
    counts = dict.fromkeys(THRESHOLDS, 0)
    parameters = equal = flips = 0
    before_square = change_square = along = 0.0
    for path in sorted((folder / "before").glob("*.safetensors")):
        with safe_open(path, "pt") as one, safe_open(folder / "after" / path.name, "pt") as two:
            for name in one.keys():  # noqa: SIM118 - not a dictionary
                a, b = one.get_tensor(name).float().numpy(), two.get_tensor(name).float().numpy()
                change = b - a
                size, moved = np.abs(a), np.abs(change)
                parameters += a.size
                equal += int(np.count_nonzero(change == 0))
                flips += int(np.count_nonzero(a * b < 0))
                before_square += float(np.sum(np.square(a), dtype=np.float64))
                change_square += float(np.sum(np.square(change), dtype=np.float64))
                along += float(np.sum(a * change, dtype=np.float64))
                for percent in THRESHOLDS:
                    counts[percent] += int(np.count_nonzero(moved > size * (percent / 100)))
    shares = {f"{percent:g}": count / parameters for percent, count in counts.items()}
    return {**shares, "equal": equal / parameters, "l2": (change_square / before_square) ** 0.5}


def reading(folder: Path) -> dict[str, float]:
    """Both files into torch, nothing else."""
    buffer: Any = torch.empty(1 << 28, dtype=torch.uint8).numpy()
    for path in sorted(folder.glob("*/*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(memoryview(buffer)):
                pass
    return {}


def child(folder: Path) -> None:
    """Peak memory of ours in a process of its own. (getrusage would give the parent's, from before exec.)"""
    ours(folder)
    status = Path("/proc/self/status").read_text()
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9)


def peak_gb(folder: Path) -> float:
    """Of a process that only compares."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(folder)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--small", type=float, default=1.0)
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child is not None:
        child(options.child)
        return
    root = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        sizes = {"small": make(root / "small", options.small, 0), "large": make(root / "large", options.gb, 1)}
        began = time.perf_counter()
        ours(root / "small")
        first = time.perf_counter() - began
        began = time.perf_counter()
        ours(root / "small")
        compiling = first - (time.perf_counter() - began)
        report(options, root, sizes, compiling)
    finally:
        shutil.rmtree(root)


def report(options: argparse.Namespace, root: Path, sizes: dict[str, int], compiling: float) -> None:
    """Alternate, and print a line for each figure."""
    contestants: dict[str, Callable[[Path], dict[str, float]]] = {
        "ours": ours, "numpy": numpy_loop, "reading": reading,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    found: dict[str, dict[str, float]] = {}
    reading(root / "large")
    for i in range(options.rounds):
        for name in list(contestants) if i % 2 else reversed(list(contestants)):
            began = time.perf_counter()
            found[name] = contestants[name](root / "large")
            seconds[name].append(time.perf_counter() - began)
    worst = max(abs(found["ours"][key] - value) for key, value in found["numpy"].items())
    rates = {name: sizes["large"] / 1e9 / statistics.median(spent) for name, spent in seconds.items()}
    lines: list[dict[str, Any]] = []
    for name, target in TARGETS.items():
        ratios = [b / a for a, b in zip(seconds["ours"], seconds[name], strict=True)]
        lines.append(
            {
                "name": f"analyze weights / {name}",
                "ours": round(rates["ours"], 3),
                "peer": round(rates[name], 3),
                "unit": "GB/s a side",
                "ratio": round(statistics.median(ratios), 3),
                "target": target,
                "pass": statistics.median(ratios) >= target,
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        )
    lines[0] |= {"largest_difference": worst, "compile_seconds": round(compiling, 1)}
    peaks = {name: round(peak_gb(root / name), 3) for name in sizes}
    lines.append(
        {
            "name": "analyze weights memory",
            "ours": max(peaks.values()),
            "peer": None,
            "unit": "GB",
            "ratio": None,
            "target": MEMORY_LIMIT_GB,
            "pass": max(peaks.values()) < MEMORY_LIMIT_GB,
            "by_size": {f"{sizes[name] / 1e9:.2f} GB": peak for name, peak in peaks.items()},
        }
    )
    for line in lines:
        if options.json:
            print(json.dumps(line), flush=True)
        else:
            print(f"{line['name']}: {line['ours']} / {line['peer']} {line['unit']}, {line['ratio']} ({line['target']})")


if __name__ == "__main__":
    main()
