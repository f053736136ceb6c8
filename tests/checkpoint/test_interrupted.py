"""A conversion that fails or is killed leaves nothing that looks whole, and starts again cleanly."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoint_workers as workers
import psutil
import pytest
import torch
from tiny_llama import all_tensors, edited_copy

from prism_nemo.checkpoint import files
from prism_nemo.checkpoint.convert import export_hf, import_hf
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.runtime.launch import launch

ONE, TP2, PP2, DP2 = ParallelConfig(), ParallelConfig(2), ParallelConfig(1, 2), ParallelConfig(1, 1, 2)
K = "model.layers.2.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupted") / "checkpoint"
    import_hf(tiny_hf, path, ONE)
    return path


@pytest.mark.parametrize(
    ("how", "rank", "layout", "message"),
    [
        ("full", 0, ONE, "checkpoint: writing failed: the disk is full; nothing was left behind"),
        ("full", 1, TP2, "checkpoint: writing failed: the disk is full; nothing was left behind"),
        ("error", 1, PP2, "RuntimeError: the reader died"),
    ],
    ids=["disk full", "disk full on rank 1 of 2", "error on rank 1 of 2"],
)
def test_import_that_fails(
    tiny_hf: Path, tmp_path: Path, how: str, rank: int, layout: ParallelConfig, message: str
) -> None:
    out = tmp_path / "checkpoint"
    with pytest.raises(PrismError, match=message) as caught:
        launch(workers.import_that_fails, str(tiny_hf), str(out), how, rank, layout, processes=layout.world_size)
    assert not isinstance(caught.value, InputError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "layout"), [(0, ONE), (1, DP2)], ids=["alone", "rank 1 of 2"])
def test_export_that_fails(checkpoint: Path, tmp_path: Path, rank: int, layout: ParallelConfig) -> None:
    with pytest.raises(PrismError, match="out: writing failed: the disk is full; nothing was left behind"):
        launch(
            workers.export_that_fails,
            str(checkpoint),
            str(tmp_path / "out"),
            rank,
            layout,
            processes=layout.world_size,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"out: needs 3\.00 GB, but its disk has 0\.00 GB free"):
        files.begin(tmp_path / "out", 3 * 10**9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("layout", "value"), [(ONE, float("nan")), (TP2, float("-inf"))], ids=["NaN", "Inf at TP2"])
def test_weights_that_are_not_numbers(tiny_hf: Path, tmp_path: Path, layout: ParallelConfig, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[K][-1, -1] = value

    bad = edited_copy(tiny_hf, tmp_path / "bad", tensors=change)
    with pytest.raises(InputError, match=f"tensor '{K}' holds NaN or infinity, and --strict is set"):
        import_hf(bad, tmp_path / "checkpoint", layout, strict=True)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]
    assert import_hf(bad, tmp_path / "checkpoint", layout).not_finite == [K]


SLOW = """
import sys, time
from prism_nemo.checkpoint import {module} as module
from prism_nemo.quiet import quiet
quiet()
real = module.{name}
def slow(*args):
    real(*args)
    time.sleep(0.05)
module.{name} = slow
from prism_nemo.cli import main
sys.argv = ["prism-nemo"] + {arguments!r}
main()
"""


def start_slow(module: str, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    """The command, in a process that converts at a snail's pace and starts no others (as under torchrun)."""
    code = SLOW.format(module=module, name=name, arguments=arguments)
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen[bytes], begun: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not begun():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob("*.tmp-*"))


def test_import_killed_in_the_middle(tiny_hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    process = start_slow("importing", "ChunkWriter.tensor", ["import", str(tiny_hf), "--out", str(out)])
    kill_when(process, lambda: any(p.stat().st_size > 20_000 for p in tmp_path.glob("*.tmp-*/*.distcp")))
    assert not out.exists()
    assert len(leftovers(tmp_path)) == 1
    assert not psutil.pid_exists(process.pid)
    with pytest.raises(InputError, match="not a complete prism-nemo checkpoint"):
        export_hf(leftovers(tmp_path)[0], tmp_path / "hf")
    import_hf(tiny_hf, out, ONE)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_export_killed_in_the_middle(checkpoint: Path, tiny_hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(checkpoint), "--out", str(out), "--max-shard-size", "60KB"]
    process = start_slow("exporting", "write_file", arguments)
    kill_when(process, lambda: len(list(tmp_path.glob("*.tmp-*/model-*"))) > 2)
    assert not out.exists()
    (left,) = leftovers(tmp_path)
    assert not list(left.glob("*.index.json")), "an index of files that are not all there"
    export_hf(checkpoint, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    after = all_tensors(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in all_tensors(tiny_hf).items())


def test_nothing_is_written_over(tiny_hf: Path, tmp_path: Path) -> None:
    """Also not a name that leads nowhere."""
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="out: already exists"):
        import_hf(tiny_hf, tmp_path / "out", ONE)
