"""The study's grid as a table that expands into runs (arXiv 2603.17074, tables 3 to 11 and 20).

    python -m recipes.grid list                              # every run, and which experiments need it
    python -m recipes.grid write --root study --hardware h100x64    # their configurations and stages.json
    python -m recipes.grid submit context --dryrun                  # ... and sbatch each stage after those it needs

Runs that several experiments share are made once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.catalog import CATALOG
from recipes.hardware import find_machine
from recipes.pipeline import SUITES, Route, stages_of
from recipes.stages import Stage

SLURM = Path(__file__).resolve().parent.parent / "slurm"
_RL_MODELS = (
    "granite-3.3-8b",
    "mistral-small-24b",
    "nemotron-h-8b",
    "mistral-7b-v0.1",
    "llama-3.1-8b",
    "granite-4.0-micro",
)
_BALANCED = ("mistral-small-24b", "granite-4.0-micro", "granite-4.0-h-micro", "granite-3.3-8b")
_FROM_BASE = ("granite-3.3-8b", "llama-3.1-8b", "mistral-7b-v0.1", "nemotron-h-8b")
_CROSSED = ("llama-3.1-8b", "granite-3.3-8b", "mistral-7b-v0.1")
_BUDGETS = (10_000, 15_000, 25_000, 30_000)  # steps of 1,048,576 tokens: 10.49, 15.73, 26.21, 31.46 B


@dataclass(frozen=True)
class Experiment:
    """One comparison of the study.

    Attributes:
        name: Short.
        where: Table or section.
        routes: What it compares.
        missing: What of it cannot be run here, and why.
    """

    name: str
    where: str
    routes: tuple[Route, ...]
    missing: str = ""


EXPERIMENTS = (
    Experiment("domains", "Tables 4, 5, 19", tuple(Route("granite-3.3-8b", m) for m in ("", "math", "mc", "mcs"))),
    Experiment("models", "Table 6", tuple(Route(model, mixture) for model in CATALOG for mixture in ("", "mcs"))),
    Experiment("rl", "Section 9.2, unbalanced prompts", tuple(Route(m, "mcs", "mcs") for m in _RL_MODELS)),
    Experiment("rl-balanced", "Section 9.2", tuple(Route(m, "mcs", "mcs", "balanced") for m in _BALANCED)),
    Experiment("rl-from-base", "Section 9.3", tuple(Route(m, "", "mcs") for m in _FROM_BASE)),
    Experiment(
        "mixtures",
        "Table 11",
        tuple(Route(m, mid, rl) for m in _CROSSED for mid in ("mc", "mcs") for rl in ("", "mc", "mcs")),
    ),
    Experiment(
        "timing",
        "Table 3",
        (Route("granite-4.0-micro", "mcs"),),
        missing="the checkpoints after phases 3 and 4 of Granite-4 Micro's pre-training are not public",
    ),
    Experiment(
        "context",
        "Table 8",
        tuple(Route("granite-4.0-micro", "mcs", context=length) for length in (8192, 16_384, 32_768)),
    ),
    Experiment("budget", "Tables 9, 20", tuple(Route("granite-4.0-micro", "mc", steps=steps) for steps in _BUDGETS)),
    Experiment(
        "long-context",
        "Table 7",
        tuple(
            Route("granite-3.3-8b", "mc", merge=merge, long=long)
            for merge, long in ((False, False), (False, True), (True, False), (True, True))
        ),
        missing="training the attention layers alone: this project has no way to keep the other layers still",
    ),
)


def expand(names: list[str] | None = None) -> dict[Route, list[str]]:
    """Every route of the experiments, once, with the experiments that it belongs to.

    Args:
        names: Of experiments; all if None.

    Raises:
        InputError: For an unknown name.
    """
    known = {experiment.name: experiment for experiment in EXPERIMENTS}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise InputError(f"experiment '{unknown[0]}' is unknown; choose from {', '.join(known)}")
    found: dict[Route, list[str]] = {}
    for name in names or known:
        for route in known[name].routes:
            found.setdefault(route, []).append(name)
    return found


def stages(routes: list[Route], hardware: str, root: Path, suites: tuple[str, ...] = SUITES) -> list[Stage]:
    """The stages of all routes, each once, every stage behind those that it needs."""
    found: dict[str, Stage] = {}
    for route in routes:
        for stage in stages_of(route, hardware, root, suites):
            known = found.setdefault(stage.name, stage)
            if known != stage:
                raise PrismError(f"two stages are named {stage.name}: {known} and {stage}")
    return list(found.values())


def write(found: list[Stage], root: Path) -> Path:
    """Keep every configuration below ``stages/`` and the list of commands in ``stages.json``."""
    folder = root / "stages"
    for stage in found:
        stage.write(folder)
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        {
            "name": stage.name,
            "after": list(stage.after),
            "nodes": find_machine(stage.hardware).nodes,
            "processes": stage.processes,
            "command": stage.command(folder),
        }
        for stage in found
    ]
    path = folder / "stages.json"
    path.write_text(json.dumps(listed, indent=2) + "\n")
    return path


def submit(found: list[Stage], root: Path, dry: bool) -> dict[str, str]:
    """Give every stage to sbatch, each after those that it needs; those whose output is there are left out.

    Returns:
        Job number of each stage; in a dry run its name.

    Raises:
        InputError: If the scripts of slurm/ are not beside this package.
        PrismError: If sbatch refuses one; those before it stay queued.
    """
    if not (SLURM / "stage.sh").is_file():
        raise InputError(f"{SLURM / 'stage.sh'} is not there: submit from a checkout of the repository")
    folder = root / "stages"
    jobs: dict[str, str] = {}
    for stage in found:
        if stage.done:
            continue
        machine = find_machine(stage.hardware)
        after = ":".join(jobs[name] for name in stage.after if name in jobs)
        command = ["sbatch", "--parsable", f"--job-name={stage.name}", f"--nodes={machine.nodes}"]
        command += [f"--ntasks-per-node={stage.processes // machine.nodes}"]
        command += [f"--gpus-per-node={machine.per_node}"] if machine.gpu else ["--gpus-per-node=0"]
        # A step of RL writes 1,024 answers before it can stop (see slurm/rl_8b.sh).
        command += ["--signal=USR1@1800"] if stage.verb == "rl" else []
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        command += [str(SLURM / "stage.sh"), *stage.command(folder)]
        if dry:
            print(shlex.join(command))
            jobs[stage.name] = stage.name
            continue
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise PrismError(f"{stage.name}: sbatch refused it: {done.stderr.strip()}; queued so far: {jobs}")
        jobs[stage.name] = done.stdout.strip().partition(";")[0]
    return jobs


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipes.grid", description="The study's grid.")
    parser.add_argument("action", choices=("list", "write", "submit"))
    parser.add_argument("experiments", nargs="*", help="names; all if none is given")
    parser.add_argument("--root", type=Path, default=Path("study"))
    parser.add_argument("--hardware", default="h100x64")
    parser.add_argument("--dryrun", action="store_true", help="submit: print what would be given to sbatch")
    asked = parser.parse_args(arguments)
    try:
        routes = expand(asked.experiments)
        found = stages(list(routes), asked.hardware, asked.root)
        if asked.action == "list":
            _print(routes, found)
            return 0
        print(write(found, asked.root))
        if asked.action == "submit":
            jobs = submit(found, asked.root, asked.dryrun)
            print(f"{len(jobs)} stages" + (" (dry run)" if asked.dryrun else f", jobs {', '.join(jobs.values())}"))
    except PrismError as error:
        print(f"recipes.grid: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _print(routes: dict[Route, list[str]], found: list[Stage]) -> None:
    for route, names in routes.items():
        parts = [route.model, route.mixture or "base", f"{route.context // 1024}k", f"{route.steps} steps"]
        parts = parts[:2] if not route.mixture else parts
        parts += ["merged"] * route.merge + ["long context"] * route.long
        parts += [f"RL {route.rl_mixture} {route.prompts}"] if route.rl_mixture else []
        print(f"{' / '.join(parts):<70} {', '.join(names)}")
    for experiment in EXPERIMENTS:
        if experiment.missing:
            print(f"not in it: {experiment.name} ({experiment.where}): {experiment.missing}")
    counts = {verb: sum(stage.verb == verb for stage in found) for verb in ("midtrain", "rl", "eval")}
    print(f"{len(routes)} runs, {len(found)} stages: " + ", ".join(f"{n} {verb}" for verb, n in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
