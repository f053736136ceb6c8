"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import fault_workers as workers
import psutil
import pytest
from tiny_training import LLAMA

from prism_nemo.checkpoint.atomic import read_manifest
from prism_nemo.checkpoint.native import find_latest, step_directory
from prism_nemo.config import ParallelConfig, PrecisionConfig
from prism_nemo.errors import PrismError
from prism_nemo.runtime.launch import launch

ONE, TP2, PP2, DP2 = ParallelConfig(), ParallelConfig(2), ParallelConfig(1, 2), ParallelConfig(1, 1, 2)


@pytest.mark.parametrize("fork_each", [False, True], ids=["writer", "forked"])
@pytest.mark.parametrize("layout", [ONE, DP2, TP2, PP2], ids=["one", "DP2", "TP2", "PP2"])
def test_what_is_written_is_what_was_there_at_the_call(layout: ParallelConfig, fork_each: bool, tmp_path: Path) -> None:
    """Every file equals, by its hash, that of a synchronous save at the same moment: weights, moments, Adam's step,
    learning rates, state and random generators, although all of them change while the writer holds its snapshot.
    """
    launch(workers.saved_twice, LLAMA, str(tmp_path), layout, fork_each, processes=layout.world_size)
    equal_files(tmp_path)


def equal_files(folder: Path) -> None:
    """What `saved_twice` left behind is the same, by its hashes, but for a pickle."""
    for step in (1, 2):
        folders = [step_directory(folder / name, step) for name in ("sync", "async")]
        same, other = (read_manifest(path)["sha256"] for path in folders)
        # A pickle; equal contents are not equal bytes, for it also says which of its objects are one and the same.
        assert same.pop(".metadata")
        assert other.pop(".metadata")
        assert same == other
        assert any(name.endswith(".distcp") for name in same)
        places = [pickle.loads((path / ".metadata").read_bytes()).storage_data for path in folders]
        assert places[0] == places[1]
    first, second = (read_manifest(step_directory(folder / "async", step))["sha256"] for step in (1, 2))
    assert first != second


DELAYED = PrecisionConfig(
    dtype="bf16", fp8="emulate", fp8_recipe="delayed", fp8_amax_history_len=3, fp8_amax_compute_algo="max"
)


@pytest.mark.parametrize("fork_each", [False, True], ids=["writer", "forked"])
@pytest.mark.parametrize("layout", [ONE, TP2], ids=["one", "TP2"])
def test_delayed_scales_are_written_as_they_were(layout: ParallelConfig, fork_each: bool, tmp_path: Path) -> None:
    """They are neither parameters nor buffers; a writer that is not told them saves those of its own model, which never
    ran. So are fp32 weights beside bf16 ones."""
    launch(workers.saved_twice, LLAMA, str(tmp_path), layout, fork_each, DELAYED, processes=layout.world_size)
    equal_files(tmp_path)


@pytest.mark.parametrize(
    ("how", "rank", "layout", "message"),
    [
        ("full", 0, ONE, r"saving .*step_00000002 failed \(No space left on device: the disk is full\); earlier check"),
        ("full", 1, DP2, r"saving .*step_00000002 failed \(No space left on device: the disk is full\); earlier check"),
        ("error", 1, TP2, r"saving .*step_00000002 failed \(bad luck\); earlier checkpoints are untouched"),
        ("killed", 0, ONE, r"saving .*step_00000002 failed: the process that writes checkpoints ended without a mess"),
    ],
    ids=["disk full", "disk full for rank 1 of 2", "error in rank 1 of 2", "killed"],
)
def test_a_writer_that_fails_ends_the_run_with_the_cause(
    how: str, rank: int, layout: ParallelConfig, message: str, tmp_path: Path
) -> None:
    args = (LLAMA, str(tmp_path), layout, how, rank)
    with pytest.raises(PrismError, match=message):
        launch(workers.fails_in_the_background, *args, processes=layout.world_size)
    assert find_latest(tmp_path) == step_directory(tmp_path, 1)
    assert not step_directory(tmp_path, 2).exists()


def test_a_writer_killed_on_one_rank_of_two(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"step_00000002 failed"):
        launch(workers.fails_in_the_background, LLAMA, str(tmp_path), DP2, "killed", 1, processes=2)
    assert find_latest(tmp_path) == step_directory(tmp_path, 1)


def test_an_error_in_the_loop_waits_for_the_writer(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="the training loop broke"):
        launch(workers.raises_while_writing, LLAMA, str(tmp_path))
    assert find_latest(tmp_path) == step_directory(tmp_path, 1)


def test_never_two_at_a_time(tmp_path: Path) -> None:
    names, seconds = launch(workers.two_saves, LLAMA, str(tmp_path))
    assert "step_00000001" in names  # published before the second began
    assert seconds > 0.2
    assert find_latest(tmp_path) == step_directory(tmp_path, 2)


def test_a_writer_with_another_model_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"hold different tensors .*checkpoint\.async_save=false"):
        launch(workers.another_model_in_the_writer, LLAMA, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_writer_ends_with_its_rank(tmp_path: Path) -> None:
    with pytest.raises(PrismError):
        launch(workers.writer_ends_with_its_rank, str(tmp_path / "pid"))
    ends(tmp_path / "pid")


def ends(file: Path) -> None:
    """The process of this id is gone, soon."""
    pid, deadline = int(file.read_text()), time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert pid != os.getpid()


@pytest.mark.parametrize(
    ("how", "rank", "layout", "message"),
    [
        ("full", 1, TP2, r"saving .*step_00000002 failed \(No space left on device: the disk is full\); earlier check"),
        ("error", 1, TP2, r"saving .*step_00000002 failed \(rank 1: .*bad luck\); earlier checkpoints are untouched"),
        ("killed", 0, ONE, r"saving .*step_00000002 failed \(.*ended without a message: killed\?\); earlier"),
        ("killed", 1, TP2, r"saving .*step_00000002 failed \(.*ended without a message: killed\?\); earlier"),
    ],
    ids=["disk full for rank 1 of 2", "error in rank 1 of 2", "killed", "killed for rank 1 of 2"],
)
def test_a_forked_process_that_fails_ends_the_run_with_the_cause(
    how: str, rank: int, layout: ParallelConfig, message: str, tmp_path: Path
) -> None:
    args = (LLAMA, str(tmp_path), layout, how, rank)
    with pytest.raises(PrismError, match=message):
        launch(workers.fails_in_a_forked_process, *args, processes=layout.world_size)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert find_latest(tmp_path) == step_directory(tmp_path, 1)


def test_forked_saves_are_kept_by_policy(tmp_path: Path) -> None:
    names = launch(workers.kept_by_policy, LLAMA, str(tmp_path), DP2, processes=2)
    assert names == ["step_00000003"]


def test_an_error_in_the_loop_gives_a_forked_save_up(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(PrismError, match="the training loop broke"):
        launch(workers.raises_while_a_forked_process_writes, LLAMA, str(tmp_path / "checkpoints"))
    assert list((tmp_path / "checkpoints").iterdir()) == []
    ends(tmp_path / "pid")


def test_a_forked_process_ends_with_its_rank(tmp_path: Path) -> None:
    with pytest.raises(PrismError):
        launch(workers.forked_process_ends_with_its_rank, LLAMA, str(tmp_path / "checkpoints"))
    ends(tmp_path / "pid")


def test_parameters_do_not_share_one_adam_step_counter(tmp_path: Path) -> None:
    """Megatron gives all parameters one step tensor; torch's AdamW then counts it up once per parameter."""
    steps, shared = launch(workers.adam_steps_after_load, LLAMA, str(tmp_path / "checkpoint"))
    assert steps == [3.0]
    assert not shared
