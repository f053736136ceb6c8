"""The report of a run with a million steps: how long it takes to build, and to open in a browser.

    python benchmarks/report.py [--json] [--rounds 3] [--rows 1000000]

The rows are those of a mid-training run from four sources, some 600 bytes each. Interleaved, each in a process of its
own, the order alternating:

- ours: `prism-nemo report`, from starting the command to the written page;
- the peer: `pandas.read_json(lines=True)` on the same file, which every table or plot made with pandas begins with.

The page is then opened from disk in headless Chromium; the figure is the time to the load event, with every script of
the page run, and the run fails where the console has an error. Without Chromium that figure is left out, and said so.
Figures are medians of rounds; targets are 10 s to build and 2 s to open, absolute.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prism_nemo.config import MidtrainConfig
from prism_nemo.run import RunDirectory

BUILD_SECONDS, OPEN_SECONDS = 10.0, 2.0
SOURCES = {"general": 0.4, "math": 0.3, "code": 0.2, "science": 0.1}
TOKENS = 8192


def write_run(path: Path, rows: int) -> None:
    """A run directory with that many steps."""
    draw = random.Random(0)
    run = RunDirectory(path)
    run.begin("midtrain", MidtrainConfig(run_dir=str(path), train_steps=rows), [], 0)
    with run.metrics_path.open("w") as file:
        for step in range(1, rows + 1):
            loss = 2 + 3 / (1 + step / 1000) + draw.random() / 10
            line = {
                "step": step,
                "loss": loss,
                "grad_norm": 1 + draw.random(),
                "lr": 5e-5 * (1 - step / rows),
                "tokens": step * TOKENS,
                "skipped_steps": 0,
                "tokens_per_second": 10_000 + 500 * draw.random(),
                "tflops": 400 + draw.random(),
                "memory_gb": 60.5,
                "seconds": 0.8 + draw.random() / 10,
                "busy_seconds": 0.7 + draw.random() / 10,
            }
            for name, share in SOURCES.items():
                line[f"tokens/{name}"] = int(step * TOKENS * share)
                line[f"epoch/{name}"] = step / rows
                line[f"loss/{name}"] = loss + draw.random() / 10
            file.write(json.dumps(line) + "\n")


def seconds_of(command: list[str]) -> float:
    """Wall time of a command.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def opening(page: Path, rounds: int) -> list[float] | str:
    """Seconds to the load event in a fresh context of Chromium, or why they were not measured.

    Raises:
        RuntimeError: If the console has an error.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        return str(error)
    found = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
    if found is None:
        return "no Chromium"
    taken, said = [], []
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which(found), args=["--no-sandbox", "--disable-gpu"])
        for _ in range(rounds):
            context = chromium.new_context()
            tab = context.new_page()
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("console", lambda one: said.append(one.text) if one.type == "error" else None)
            began = time.perf_counter()
            tab.goto(page.resolve().as_uri(), wait_until="load")
            taken.append(time.perf_counter() - began)
            context.close()
        chromium.close()
    if said:
        raise RuntimeError(f"the page has errors: {said}")
    return taken


def main() -> int:
    """Measure and print; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, page = Path(folder) / "run", Path(folder) / "report.html"
        write_run(run, options.rows)
        read = f"import pandas; pandas.read_json({str(run / 'metrics.jsonl')!r}, lines=True)"
        contestants: dict[str, Callable[[], float]] = {
            "ours": lambda: seconds_of([sys.executable, "-m", "prism_nemo", "report", str(run), "--out", str(page)]),
            "peer": lambda: seconds_of([sys.executable, "-c", read]),
        }
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(options.rounds):
            for name in list(contestants) if number % 2 else reversed(contestants):
                taken[name].append(contestants[name]())
        opened = opening(page, options.rounds)
    ours, peer = (statistics.median(taken[name]) for name in ("ours", "peer"))
    ratio = statistics.median(p / o for o, p in zip(taken["ours"], taken["peer"], strict=True))
    results = [_result("report of a million rows, built", ours, peer, ratio, BUILD_SECONDS)]
    if isinstance(opened, str):
        print(f"opening was not measured: {opened}", file=sys.stderr)
    else:
        results.append(_result("the page, opened in Chromium", statistics.median(opened), None, None, OPEN_SECONDS))
    for one in results:
        if options.json:
            print(json.dumps(one))
        else:
            beside = "" if one["peer"] is None else f", pandas reads the file in {one['peer']} s"
            print(f"{one['name']}: {one['ours']} s (target {one['target']} s){beside}")
    return int(not all(one["pass"] for one in results))


def _result(name: str, ours: float, peer: float | None, ratio: float | None, target: float) -> dict[str, object]:
    return {
        "name": name,
        "ours": round(ours, 2),
        "peer": None if peer is None else round(peer, 2),
        "unit": "s",
        "ratio": None if ratio is None else round(ratio, 2),
        "target": target,
        "pass": ours < target,
    }


if __name__ == "__main__":
    sys.exit(main())
