"""Speed and memory of import and export, against `cp` and against transformers, interleaved in one run.

    python benchmarks/convert.py [--json] [--rounds 5] [--gb 4] [--small 1] [--dir /tmp]

A Llama-shaped bf16 checkpoint in several shards is generated at two sizes. A round is, in changing order: `cp` of the
folder, our import, our export, transformers' `from_pretrained` and `save_pretrained`, each in a process of its own and
each until its files are on disk (fsync); inputs are in the page cache. Figures are medians over rounds of ratios within
a round, so that a busy machine slows all alike.

Seconds run from the call to its return: what a process spends on importing Python packages (5 to 10 s for both ours and
transformers, whatever the size of the model) is reported as `start_up_seconds` and not part of the ratios. Memory is
the resident set, anonymous and file pages, summed over the command's processes (so that pages that they share count
more than once), polled every 50 ms; the largest value counts.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil

HIDDEN, FFN, HEADS, GROUPS, VOCABULARY = 4096, 11008, 32, 8, 32000
MEMORY_LIMIT_GB = 1.5
TARGETS = {"cp": 0.7, "transformers": 1.3}


def config(layers: int) -> dict[str, Any]:
    """``config.json`` of the generated model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "dtype": "bfloat16",
    }


def generate(folder: Path, size_gb: float) -> int:
    """A checkpoint of at least this size in shards of at most 1 GB; its bytes."""
    import torch

    from prism_nemo.checkpoint.hf import blocks_of
    from prism_nemo.checkpoint.hf_writer import Planned, plan_files, write_file, write_index
    from prism_nemo.models.family import architecture_from_hf, parameter_count, table_of
    from prism_nemo.models.weights import expand

    layers = 1
    while 2 * parameter_count(architecture_from_hf(config(layers), "benchmark")) < size_gb * 1e9:
        layers += 1
    random = torch.randn(2**21, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def planned(name: str, shape: tuple[int, ...]) -> Planned:
        def blocks() -> Iterator[torch.Tensor]:
            for _, rows in blocks_of(shape, torch.bfloat16):
                yield random[: torch.Size((rows, *shape[1:])).numel()]

        return Planned(name, torch.bfloat16, shape, blocks)

    architecture = architecture_from_hf(config(layers), "benchmark")
    tensors = [
        planned(name, shape)
        for mapping, layer in expand(table_of(architecture))
        for name, shape in zip(mapping.at(layer)[1], mapping.hf_shapes(), strict=True)
    ]
    folder.mkdir()
    files = plan_files(tensors, 10**9)
    for name, content in files.items():
        write_file(folder / name, content)
    write_index(folder, files)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    return sum(tensor.bytes for tensor in tensors)


def ready() -> None:
    """Run by a worker before the clock starts, so that the server of worker processes is up."""


def sync(folder: Path) -> None:
    """Bring every file of a folder to disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def warm(folder: Path) -> None:
    """Bring a job's input into the page cache, so that every job reads from memory."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as opened:
                while opened.read(2**24):
                    pass


def child(job: str, source: Path, target: Path) -> float:
    """One job in this process; its seconds."""
    if job == "transformers":
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

        began = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        model.save_pretrained(target, max_shard_size="5GB")
        sync(target)
        return time.perf_counter() - began
    from prism_nemo.checkpoint.convert import export_hf, import_hf
    from prism_nemo.config import ParallelConfig
    from prism_nemo.quiet import quiet
    from prism_nemo.runtime.launch import launch

    quiet()
    launch(ready)
    began = time.perf_counter()
    if job == "import":
        import_hf(source, target, ParallelConfig())
    else:
        export_hf(source, target)
    return time.perf_counter() - began


def resident(process: psutil.Process) -> int:
    """Resident bytes of a process and its descendants."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def measure(job: str, source: Path, target: Path) -> dict[str, float]:
    """Run a job; seconds, whole seconds of the command, peak memory in GB."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", job, str(source), str(target)]
    if job == "cp":
        command = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(source), str(target)]
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, resident(watched))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05 if job != "cp" else 0.01)
    output, errors = process.communicate()
    whole = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{job} failed:\n{errors}")
    seconds = whole if job == "cp" else float(output.strip().splitlines()[-1])
    return {"seconds": seconds, "whole_seconds": whole, "peak_gb": peak / 1e9}


def rounds_of(work: Path, source: Path, count: int) -> list[dict[str, dict[str, float]]]:
    """Rounds of all jobs; every job's output is removed before the next job."""
    native = work / "native"
    measure("import", source, native)
    for folder in (source, native):
        warm(folder)
    jobs, found = [("cp", source), ("import", source), ("export", native), ("transformers", source)], []
    for i in range(count):
        one = {}
        for job, origin in jobs[i % 4 :] + jobs[: i % 4]:
            one[job] = measure(job, origin, work / "out")
            shutil.rmtree(work / "out")
        found.append(one)
    shutil.rmtree(native)
    return found


def benchmark(work: Path, sizes: list[float], rounds: int) -> list[dict[str, Any]]:
    """All figures; the speeds are those of the larger size."""
    results: list[dict[str, Any]] = []
    memory: dict[str, dict[str, float]] = {}
    for size in sizes:
        source = work / "source"
        bytes_ = generate(source, size)
        found = rounds_of(work, source, rounds if size == max(sizes) else 1)
        shutil.rmtree(source)
        label = f"{bytes_ / 1e9:.2f} GB"
        jobs = ("import", "export", "transformers")
        memory[label] = {job: round(max(one[job]["peak_gb"] for one in found), 3) for job in jobs}
        if size != max(sizes):
            continue
        for job in ("import", "export"):
            for peer, target in TARGETS.items():
                ratios = [one[peer]["seconds"] / one[job]["seconds"] for one in found]
                speed = {
                    name: round(bytes_ / 1e9 / statistics.median(one[name]["seconds"] for one in found), 2)
                    for name in (job, peer)
                }
                ratio = statistics.median(ratios)
                results.append(
                    {
                        "name": f"convert_{job}_against_{peer}",
                        "ours": speed[job],
                        "peer": speed[peer],
                        "unit": "GB/s",
                        "ratio": round(ratio, 3),
                        "target": target,
                        "pass": ratio >= target,
                        "bytes": bytes_,
                        "start_up_seconds": {
                            name: round(
                                statistics.median(o[name]["whole_seconds"] - o[name]["seconds"] for o in found), 1
                            )
                            for name in (job, peer)
                        },
                        "ratios": [round(r, 3) for r in ratios],
                    }
                )
    ours = max(values[job] for values in memory.values() for job in ("import", "export"))
    results.append(
        {
            "name": "convert_peak_memory",
            "ours": ours,
            "unit": "GB",
            "target": MEMORY_LIMIT_GB,
            "pass": ours < MEMORY_LIMIT_GB,
            "by_size": memory,
        }
    )
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--small", type=float, default=1.0)
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job, source, target = arguments.child
        print(child(job, Path(source), Path(target)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        free, needed = shutil.disk_usage(work).free / 1e9, 4 * arguments.gb
        if free < needed:
            sys.exit(f"{work}: {free:.1f} GB free, {needed:.1f} GB needed; choose another place with --dir")
        results = benchmark(Path(work), [arguments.small, arguments.gb], arguments.rounds)
    for result in results:
        if arguments.json:
            print(json.dumps(result))
        else:
            print(", ".join(f"{key} {value}" for key, value in result.items() if key != "ratios"))


if __name__ == "__main__":
    main()
