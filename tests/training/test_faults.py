"""Nothing is lost beyond the last complete checkpoint, whatever happens and when."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fault_workers as workers
import psutil
import pytest
from tiny_training import LAYOUTS, STEPS, midtrain_config, numbers

from prism_nemo.checkpoint.atomic import MANIFEST, read_manifest
from prism_nemo.checkpoint.native import find_latest, step_directory
from prism_nemo.config import MidtrainConfig, to_yaml
from prism_nemo.errors import InputError, PrismError
from prism_nemo.run import read_metrics
from prism_nemo.runtime.launch import _PRELOAD, launch
from prism_nemo.training.midtrain import midtrain

FEW_KILLS, MANY_KILLS = 5, 30


def _start(config: MidtrainConfig, writing_takes: float) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=workers.midtrain_alone, args=(config, writing_takes))
    process.start()
    return process


def _lines(config: MidtrainConfig) -> int:
    return len(read_metrics(Path(config.run_dir) / "metrics.jsonl"))


def _kill_at_random(config: MidtrainConfig, rng: random.Random, kills: int) -> int:
    """Kill the run's whole process group `kills` times, each time after it got a step further; then let it finish.

    Returns:
        How often a checkpoint was being written.
    """
    torn = 0
    for _ in range(kills):
        before, process = _lines(config), _start(config, writing_takes=0.1)
        deadline = time.monotonic() + 120
        while _lines(config) <= before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        if not process.is_alive():
            assert process.exitcode == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        torn += bool(list(Path(config.run_dir, "checkpoints").glob("*.tmp-*")))
        latest = find_latest(Path(config.run_dir, "checkpoints"))
        if latest is not None:
            read_manifest(latest)
    process = _start(config, writing_takes=0.0)
    process.join()
    assert process.exitcode == 0
    return torn


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(FEW_KILLS, 1), pytest.param(MANY_KILLS, 2, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_killed_at_random_instants(kills: int, seed: int, data: Path, initial: Path, tmp_path: Path) -> None:
    """Saving after every step with a slow writer, so that most kills come in the middle of a save."""
    steps = 4 * kills
    whole = midtrain_config(tmp_path / "whole", data, initial, train_steps=steps)
    launch(midtrain, whole)
    config = midtrain_config(tmp_path / "run", data, initial, train_steps=steps)
    config.checkpoint.save_interval, config.checkpoint.keep = 1, 2
    torn = _kill_at_random(config, random.Random(seed), kills)
    assert torn >= 1
    assert numbers(config.run_dir) == numbers(whole.run_dir)
    left = sorted(path.name for path in Path(config.run_dir, "checkpoints").iterdir())
    assert left == [step_directory(Path(), step).name for step in (steps - 1, steps)]


def _largest(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


TEARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda c: os.truncate(_largest(c), 1000), "has 1000 bytes, the manifest says"),
    "flipped byte": (lambda c: _flip(_largest(c)), r"distcp: its SHA-256 is not the one in manifest.json"),
    "flipped byte in .metadata": (lambda c: _flip(c / ".metadata"), r"\.metadata: its SHA-256 is not"),
    "missing file": (lambda c: _largest(c).unlink(), r"distcp: missing from the checkpoint"),
    "missing manifest": (lambda c: (c / MANIFEST).unlink(), r"manifest.json is missing"),
    "manifest cut short": (lambda c: os.truncate(c / MANIFEST, 100), r"manifest.json: not valid JSON"),
    "manifest of zeros": (lambda c: (c / MANIFEST).write_bytes(b"\0\xff" * 50), r"manifest.json: not valid JSON"),
    "empty folder": (lambda c: (shutil.rmtree(c), c.mkdir()), r"manifest.json is missing"),
}


def test_torn_checkpoints_are_passed_over_and_named(run_of: Callable[..., Path], tmp_path: Path) -> None:
    import re

    for name, (tear, _) in TEARS.items():
        shutil.copytree(run_of("TP1") / "checkpoints", tmp_path / name)
        tear(step_directory(tmp_path / name, STEPS))
    found = launch(workers.newest_of, [str(tmp_path / name) for name in TEARS])
    for (name, (_, cause)), (latest, problems) in zip(TEARS.items(), found, strict=True):
        assert latest == "step_00000008", name
        assert len(problems) == 1, name
        assert re.search(cause, problems[0]), (name, problems)
        assert not step_directory(tmp_path / name, STEPS).exists()
        assert len(list((tmp_path / name).glob(f"damaged_step_{STEPS:08d}_*"))) == 1


def test_a_flipped_byte_is_found_before_training_goes_on_from_it(
    run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    import json

    shutil.copytree(run_of("TP1"), tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (8, STEPS):
        _flip(_largest(step_directory(checkpoints, step)))
    launch(midtrain, midtrain_config(tmp_path / "run", data, initial))
    assert numbers(tmp_path / "run") == numbers(run_of("TP1"))
    lineage = json.loads((tmp_path / "run" / "lineage.json").read_text())
    events = [event for event in lineage["events"] if event["event"] == "damaged checkpoint"]
    assert [event["to"] for event in events] == [4, 4]
    assert all("SHA-256" in event["problem"] for event in events)


def test_a_damaged_parent_is_refused(run_of: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    shutil.copytree(step_directory(run_of("TP1") / "checkpoints", STEPS), tmp_path / "parent")
    file = _largest(tmp_path / "parent")
    _flip(file)
    with pytest.raises(InputError, match=f"init_from: .*{file.name}: its SHA-256 is not"):
        launch(midtrain, midtrain_config(tmp_path / "run", data, tmp_path / "parent"))


@pytest.fixture
def small_disk(run_of: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    """A run directory whose checkpoints lie on a disk with room for one and a half of them."""
    size = sum(read_manifest(step_directory(run_of("TP1") / "checkpoints", STEPS))["files"].values())
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(checkpoints)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield tmp_path / "run"
    subprocess.run(["umount", "-l", str(checkpoints)], check=True)


@pytest.mark.parametrize("layout", ["TP1", "DP2"])
def test_a_full_disk(layout: str, small_disk: Path, run_of: Callable[..., Path], data: Path, initial: Path) -> None:
    """Step 4 fits, step 8 does not; with more room the run goes on from step 4 with the same numbers."""
    config = midtrain_config(small_disk, data, initial, parallel=LAYOUTS[layout])
    with pytest.raises(PrismError, match=r"saving .*step_00000008 failed .*No space left on device.*untouched"):
        launch(midtrain, config, processes=config.parallel.world_size)
    checkpoints = small_disk / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000004"]
    subprocess.run(["mount", "-o", "remount,size=1g", str(checkpoints)], check=True)
    launch(midtrain, config, processes=config.parallel.world_size)
    assert numbers(small_disk) == numbers(run_of(layout))


def test_a_second_run_in_the_directory_is_refused(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, train_steps=100_000)
    config.checkpoint.save_interval = 10**6
    process = _start(config, writing_takes=0.0)
    try:
        deadline = time.monotonic() + 120
        while _lines(config) < 1 and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(InputError, match=f"run: process {process.pid} on .* is running in it"):
            launch(midtrain, config)
        assert process.is_alive()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


@pytest.mark.slow
def test_the_command_killed_at_random_instants(
    run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    """Two ranks under the launcher; workers and writers are in sessions of their own and must end by themselves."""
    config = midtrain_config(tmp_path / "run", data, initial, parallel=LAYOUTS["DP2"])
    config.checkpoint.save_interval = 1
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    rng, kills = random.Random(0), 0
    for _ in range(60):
        before = _lines(config)
        process = subprocess.Popen(
            [sys.executable, "-m", "prism_nemo", "midtrain", str(tmp_path / "recipe.yaml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while _lines(config) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.4)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
    assert kills >= 3
    assert numbers(config.run_dir) == numbers(run_of("DP2"))
