"""The batch path: how fast samples become batches, how long a large plan takes to start, and in how much memory.

Part of `benchmarks/data.py`, and runnable alone:

    python benchmarks/data_batches.py [--json] [--rounds 5]

- Throughput: ours against Megatron's own GPTDataset and BlendedDataset with torch's collation, on the same token files
  in a warm page cache, 11 sources, samples of 8,192 tokens, micro-batches of 2; rounds alternate.
- Start: a build of 27e9 tokens in 27 million documents and 11 sources, whose `.bin` files are sparse (they hold no
  text, but have their size). A process of its own opens it, checks the plan, and reads its first batch: the first time,
  when the rows are packed and written, and again. The same at a tenth of the budget, for memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SEQ = 8192
MICRO_BATCH = 2
SHARES = [0.05, 0.05, 0.1, 0.07, 0.2, 0.03, 0.1, 0.1375, 0.1375, 0.0775, 0.0475]  # eleven sources, as in the study
BUDGET = 27e9


def write_build(folder: Path, tokens: float, text: bool) -> Path:
    """Writes a finished build by hand: log-normal documents, about 1,000 tokens each; files without text are sparse."""
    from prism_nemo.data.indexed import write_index
    from prism_nemo.data.manifest import BuiltSource, BuiltTokenizer, Manifest

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    sources = []
    for i, share in enumerate(SHARES):
        size = int(tokens * share)
        lengths = np.clip(rng.lognormal(6.4, 1.0, int(size / 850)), 16, 400_000).astype(np.int32)
        fingerprint = f"{i:064x}"
        prefix = f"source{i}-{fingerprint[:12]}"
        total = int(lengths.sum(dtype=np.int64))
        write_index(folder / f"{prefix}.idx", lengths, np.dtype(np.uint16))
        with open(folder / f"{prefix}.bin", "wb") as stream:
            if text:
                stream.write(rng.integers(0, 30_000, total, dtype=np.uint16).tobytes())
            else:
                stream.truncate(total * 2)
        sources.append(
            BuiltSource(
                name=f"source{i}",
                domain="general",
                weight=share,
                max_epochs=None,
                documents=len(lengths),
                tokens=total,
                characters=0,
                dtype="uint16",
                fingerprint=fingerprint,
                prefix=prefix,
                inputs=[],
            )
        )
    tokenizer = BuiltTokenizer(str(folder), "0" * 64, 32_768, 0, 1)
    manifest = Manifest(folder, "benchmark", None, tokenizer, {}, sources)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def megatron(build: Path, samples: int, cache: Path) -> Any:
    """Megatron's blended dataset over the same files, for training without resets, and the rows of a micro-batch."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from prism_nemo.data.manifest import load_manifest

    class Tokenizer:
        pad, vocab_size, eod = -1, 32_768, 0
        unique_identifiers = {"name": "benchmark"}  # noqa: RUF012

    manifest = load_manifest(build)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ,
        blend_per_split=[([manifest.prefix(s.name) for s in manifest.sources], SHARES), None, None],
        path_to_cache=str(cache),
        mid_level_dataset_surplus=0.05,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [samples, None, None], lambda: True, config).build()[0]
    collate = torch.utils.data.default_collate
    return lambda first: collate([dataset[first + i] for i in range(MICRO_BATCH)])


def throughput(folder: Path, rounds: int) -> dict[str, Any]:
    """Tokens per second of both, on the same files."""
    from prism_nemo.data.manifest import load_manifest
    from prism_nemo.data.plan import make_plan
    from prism_nemo.data.samples import Samples

    build = write_build(folder / "warm", 100e6, text=True)
    per_round, warm_up = 400, 200
    total = (rounds * per_round + warm_up) * MICRO_BATCH
    manifest = load_manifest(build)
    samples = Samples(manifest, make_plan(manifest, seq_length=SEQ, seed=1, packing="best_fit"), folder / "index")
    samples.prepare(0, total)
    contestants = {
        "ours": lambda first: samples.rows(first, MICRO_BATCH),
        "peer": megatron(build, total, folder / "cache"),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for read in contestants.values():
        for i in range(warm_up):
            read(i * MICRO_BATCH)
    for i in range(rounds):
        for name in list(contestants) if i % 2 else reversed(list(contestants)):
            first = (warm_up + i * per_round) * MICRO_BATCH
            began = time.perf_counter()
            for j in range(per_round):
                contestants[name](first + j * MICRO_BATCH)
            rates[name].append(per_round * MICRO_BATCH * SEQ / (time.perf_counter() - began))
    ours, peer = (statistics.median(rates[name]) for name in ("ours", "peer"))
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["peer"], strict=True))
    return {
        "name": "data_batches",
        "ours": round(ours),
        "peer": round(peer),
        "unit": "tokens/s",
        "ratio": round(ratio, 2),
        "target": 20_000_000,
        "pass": ours >= 20e6,
        "peer_is": "Megatron GPTDataset in BlendedDataset with torch's collation, documents not kept apart",
        "rounds": [round(rate) for rate in rates["ours"]],
    }


def open_and_read(build: Path, index: Path, budget: float, batches: int) -> dict[str, Any]:
    """What one process of a run does before and in its first steps; prints nothing."""
    began = time.perf_counter()
    from prism_nemo.data.manifest import load_manifest
    from prism_nemo.data.plan import check_epochs, make_plan
    from prism_nemo.data.samples import Samples

    imported = time.perf_counter()
    manifest = load_manifest(build)
    plan = make_plan(manifest, seq_length=SEQ, seed=1, packing="best_fit")
    samples = int(budget / SEQ)
    check_epochs(plan, manifest, samples)
    reader = Samples(manifest, plan, index)
    reader.prepare(0, samples)
    reader.rows(0, MICRO_BATCH)
    ready = time.perf_counter()
    # Spread over the whole run, so that its whole index is touched, as far as so many batches can.
    for i in range(batches):
        reader.rows(i * (samples - MICRO_BATCH) // batches, MICRO_BATCH)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    from prism_nemo.data.show import realised_tokens  # after the memory was read: it loads what a run does not

    tokens = realised_tokens(plan, samples // 100)
    off = max(abs(tokens[d.name] / sum(tokens.values()) - d.share) for d in plan.sources)
    return {
        "import_seconds": round(imported - began, 2),
        "start_seconds": round(ready - imported, 2),
        "own_memory_mb": round(int(status["RssAnon"].split()[0]) / 1024, 1),
        "mapped_memory_mb": round(int(status["RssFile"].split()[0]) / 1024, 1),
        "share_off_points": round(100 * off, 4),
    }


def in_process(*arguments: str) -> dict[str, Any]:
    """`open_and_read` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--open", *arguments], check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return dict(json.loads(done.stdout.splitlines()[-1]))


def start_and_memory(folder: Path) -> list[dict[str, Any]]:
    """Start-up, memory at two budgets, and realised shares at a hundredth of the budget."""
    build, index = write_build(folder / "large", BUDGET, text=False), folder / "rows"
    first = in_process(str(build), str(index), str(BUDGET), "500")
    again = [in_process(str(build), str(index), str(BUDGET), "500") for _ in range(3)]
    small = [in_process(str(build), str(index), str(BUDGET / 10), "500") for _ in range(3)]
    start = statistics.median(item["start_seconds"] for item in again)
    large_mb, small_mb = (statistics.median(item["own_memory_mb"] for item in items) for items in (again, small))
    off = again[0]["share_off_points"]
    return [
        {"name": "data_start", "ours": start, "peer": None, "unit": "s", "ratio": None, "target": 5.0,
         "pass": start < 5, "first_time": first["start_seconds"], "import": again[0]["import_seconds"]},
        {"name": "data_memory", "ours": large_mb, "peer": small_mb, "unit": "MB (27e9 tokens; peer: 2.7e9)",
         "ratio": round(large_mb / small_mb, 3), "target": 1.05, "pass": large_mb <= 1.05 * small_mb,
         "mapped": [again[0]["mapped_memory_mb"], small[0]["mapped_memory_mb"]]},
        {"name": "data_shares", "ours": off, "peer": None, "unit": "points off at 1 % of the budget", "ratio": None,
         "target": 0.1, "pass": off < 0.1},
    ]  # fmt: skip


def measure(rounds: int) -> list[dict[str, Any]]:
    """All figures of the batch path."""
    with tempfile.TemporaryDirectory() as name:
        return [throughput(Path(name), rounds), *start_and_memory(Path(name))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--open", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        build, index, budget, batches = arguments.open
        print(json.dumps(open_and_read(Path(build), Path(index), float(budget), int(batches))))
        return
    for line in measure(arguments.rounds):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
