"""Executions of a small program per second, and what the sandbox costs.

    python benchmarks/sandbox.py [--json] [--rounds 5] [--executions 20] [--threads 2]

Interleaved, the order alternating, the same program with the same input; figures are medians of rounds:

- `plain`: ``subprocess.run([python, "-c", program])`` with no isolation at all: the peer, and the floor;
- `bubblewrap`, `process`: `Sandbox.run`, from a thread each, one sandbox of each thread started ahead;
- `code`: `CodeVerifier` with the default sandbox: a function is called with ten cases, their values compared.

A ratio below 1 is the price of isolation. Wanted: 20 executions/s on two cores, absolute.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prism_nemo.rl.rewards.code import CodeVerifier
from prism_nemo.rl.rewards.sandbox import Sandbox
from prism_nemo.rl.rewards.sandbox.command import make_recipe
from prism_nemo.rl.rewards.task import Problem

PROGRAM = "n = int(input())\nprint(sum(i * i for i in range(n)))\n"
INPUT, OUTPUT = "1000\n", "332833500\n"
FUNCTION = "def f(n):\n    return sum(i * i for i in range(n))\n"
PROBLEM = Problem(
    "code", "", "", "", {"entry_point": "f", "cases": [[[n], sum(i * i for i in range(n))] for n in range(10)]}
)


def rate(run: Callable[[], bool], executions: int, pool: ThreadPoolExecutor) -> float:
    """Executions per second over the pool's threads.

    Raises:
        RuntimeError: If one of them is wrong.
    """
    started = time.perf_counter()
    right = list(pool.map(lambda _: run(), range(executions)))
    if not all(right):
        raise RuntimeError("a program gave a wrong result")
    return executions / (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--executions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # that process mode is weaker

    with Sandbox() as walled, Sandbox(mode="process") as limited, ThreadPoolExecutor(options.threads) as pool:
        python, verifier = make_recipe("process", walled.limits).interpreter.path, CodeVerifier()

        def plain() -> bool:
            told = subprocess.run([python, "-c", PROGRAM], input=INPUT, capture_output=True, text=True, check=False)
            return told.stdout == OUTPUT

        contestants: dict[str, Callable[[], bool]] = {
            "plain": plain,
            "bubblewrap": lambda: walled.run(PROGRAM, INPUT).stdout == OUTPUT,
            "process": lambda: limited.run(PROGRAM, INPUT).stdout == OUTPUT,
            "code": lambda: verifier.verify(PROBLEM, FUNCTION) == 1.0,
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(options.rounds + 1):
            names = list(contestants) if number % 2 else list(reversed(contestants))
            for name in names:
                measured = rate(contestants[name], options.executions, pool)
                if number:  # the first round starts what is started ahead
                    rates[name].append(measured)
    result: dict[str, Any] = {
        "executions_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratio_to_plain": {
            name: round(statistics.median(v / p for v, p in zip(values, rates["plain"], strict=True)), 3)
            for name, values in rates.items()
        },
        "slowest_round": {name: round(min(values), 1) for name, values in rates.items()},
        "threads": options.threads,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    if options.json:
        print(json.dumps(result))
        return
    for name in rates:
        print(f"{name:11s} {result['executions_per_s'][name]:7.1f}/s  {result['ratio_to_plain'][name]:.2f} x plain")


if __name__ == "__main__":
    main()
