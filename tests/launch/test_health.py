"""slurm/health.sh with a stand-in for nvidia-smi, and the judgement of slurm/allreduce.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
NVIDIA_SMI = """#!/bin/bash
case "$1" in
    *=index) printf '%s\\n' $GPUS ;;
    *ecc*) printf '%s\\n' $ERRORS ;;
    *hw_slowdown) printf '%s\\n' "$SLOWDOWN" ;;
    *clocks*) printf '%s\\n' "$CLOCKS" ;;
esac
"""
GOOD = {"GPUS": "0 1", "ERRORS": "0 [N/A]", "SLOWDOWN": "Not Active", "CLOCKS": "1755, 1980"}


def health(folder: Path, gpus: int, run_dir: Path | None = None, **values: str) -> str:
    (folder / "bin").mkdir(exist_ok=True)
    if gpus:
        (folder / "bin/nvidia-smi").write_text(NVIDIA_SMI)
        (folder / "bin/nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURMD_NODENAME": "n1", **values}
    done = subprocess.run(
        ["bash", str(SLURM / "health.sh"), str(run_dir or folder / "run"), str(gpus)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_good_node_is_said_to_be_good(tmp_path: Path) -> None:
    assert health(tmp_path, 2, **GOOD) == "ok n1"
    assert health(tmp_path, 0) == "ok n1"
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"GPUS": "0"}, "1 GPUs, 2 are needed"),
        ({"ERRORS": "0 3"}, "1 GPUs with uncorrected memory errors"),
        ({"SLOWDOWN": "Active"}, "1 GPUs slowed down by heat or power"),
        ({"CLOCKS": "990, 1980"}, "1 GPUs set to less than 60 % of their highest clock"),
    ],
)
def test_a_bad_node_says_why(tmp_path: Path, values: dict[str, str], message: str) -> None:
    assert health(tmp_path, 2, **{**GOOD, **values}) == f"bad n1: {message}"


def test_a_disk_that_is_too_small_or_cannot_be_written(tmp_path: Path) -> None:
    assert "are asked for" in health(tmp_path, 0, PRISM_NEMO_DISK_GB="999999999")
    (tmp_path / "file").touch()
    assert "cannot be written" in health(tmp_path, 0, tmp_path / "file" / "run")


def test_a_clock_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/date").write_text("#!/bin/bash\necho $(($(/bin/date +%s) - 90))\n")
    (tmp_path / "bin/date").chmod(0o755)
    found = health(tmp_path, 0)
    assert "its clock differs from the file server's by -" in found
    assert 85 <= int(found.split("by -")[1].split()[0]) <= 91


def allreduce() -> ModuleType:
    spec = importlib.util.spec_from_file_location("allreduce", SLURM / "allreduce.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_slow_node_is_named() -> None:
    judge = allreduce().judge
    assert judge({"a": 400.0, "b": 180.0, "c": 410.0}, 0.0)[1].startswith("bad b: all-reduce within the node 180 GB/s")
    assert [line[:4] for line in judge({"a": 400.0, "b": 210.0, "c": 410.0}, 0.0)] == ["ok a", "ok b", "ok c"]
    assert [line[:5] for line in judge({"a": 40.0, "b": 41.0}, 100.0)] == ["bad a", "bad b"]
    assert judge({"a": float("inf")}, 100.0) == ["ok a inf GB/s"]  # one rank: there is nothing to reduce


def test_two_ranks_measure_over_gloo(tmp_path: Path) -> None:
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SLURM / "allreduce.py")],
            env={**common, "MASTER_PORT": port, "RANK": str(r), "LOCAL_RANK": str(r), "SLURMD_NODENAME": f"n{r}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    said = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[0][:2] == ["ok n0 inf GB/s", "ok n1 inf GB/s"]
    together = float(said[0][2].removeprefix("all 2 ranks together: ").removesuffix(" GB/s"))
    assert 0 < together < 1000
    assert said[1] == []


def free_port() -> str:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
