"""Rehearsals of all seven models on 64 GPUs, each in a process of its own: time and memory beside the targets.

    python benchmarks/rehearse.py [--models NAME ...] [--seq-length 8192]

Prints one JSON line per model. Every rank's module, gradient buffers and optimizer are built at full size, and one
pipeline runs a micro-batch forward and backward. The time includes starting the process but not importing torch and
Megatron-Core, which is done once. Ends with 1 if a target is missed or a total is not the model's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

SECONDS, BYTES = 20.0, 1.5e9
LAYOUT: dict[str, Any] = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "data_parallel_size": 8}


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", help="names of the catalog; all if none")
    parser.add_argument("--seq-length", type=int, default=8192)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from prism_nemo.config import ParallelConfig
    from prism_nemo.models.catalog import CATALOG, find
    from prism_nemo.planning.rehearsal import rehearse
    from prism_nemo.quiet import quiet
    from prism_nemo.runtime.launch import launch

    quiet()
    launch(os.getpid)  # starts the server that imports once
    layout = ParallelConfig(**LAYOUT, sequence_parallel=True)
    failed = False
    for name in arguments.models or CATALOG:
        model = find(name)
        began = time.perf_counter()
        counted = rehearse(model.architecture, layout, arguments.seq_length, 1)
        seconds = time.perf_counter() - began
        line = {
            "model": model.name,
            "layout": layout.describe(),
            "ranks": len(counted.ranks),
            "seconds": round(seconds, 2),
            "peak_rss_bytes": counted.peak_bytes,
            "parameters": counted.parameters,
            "equal_to_catalog": counted.parameters == model.parameters,
            "optimizer_bytes_of_ranks": [
                min(r.optimizer_bytes for r in counted.ranks),
                max(r.optimizer_bytes for r in counted.ranks),
            ],
            "forward_tflop": round(sum(s.forward_flops for s in counted.stages) / 1e12, 3),
            "kept_bytes_by_stage": [s.kept_bytes for s in counted.stages],
            "targets": {"seconds": SECONDS, "bytes": BYTES},
            "met": seconds < SECONDS and counted.peak_bytes < BYTES,
        }
        failed |= not (line["met"] and line["equal_to_catalog"])
        print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
