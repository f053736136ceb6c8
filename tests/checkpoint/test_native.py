"""A run that is killed, or whose disk fills, at any instant of a save continues from the checkpoint before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import checkpoint_workers as workers
import pytest
import torch
from tiny_llama import all_tensors, save_tiny_llama

from prism_nemo.checkpoint.atomic import MANIFEST, read_manifest
from prism_nemo.checkpoint.native import find_latest, read_architecture, step_directory
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.family import read_hf_config
from prism_nemo.runtime.launch import launch

ONE, TP2, PP2, DP2 = ParallelConfig(), ParallelConfig(2), ParallelConfig(1, 2), ParallelConfig(1, 1, 2)


@pytest.fixture(scope="module")
def run(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, torch.Tensor]]:
    """Folder with the checkpoints of steps 10 and 20 at one process, and what was drawn after each save."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    return folder, launch(workers.saved_by_training, str(tiny_hf), str(folder), ONE, [10, 20])


@pytest.fixture
def saved(run: tuple[Path, dict[int, torch.Tensor]]) -> Path:
    """Folder with the checkpoints of steps 10 and 20; copy before editing."""
    return run[0]


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved`, to edit."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_manifest_says_what_is_inside(saved: Path, tiny_hf: Path) -> None:
    manifest = read_manifest(step_directory(saved, 20))
    assert manifest["step"] == 20
    assert manifest["has_optimizer"] is True
    assert manifest["sha256"].keys() == manifest["files"].keys()
    assert {"torch", "megatron-core", "prism-nemo"} <= manifest["versions"].keys()
    assert read_architecture(step_directory(saved, 20)) == read_hf_config(tiny_hf)


@pytest.mark.parametrize("layout", [ONE, TP2, PP2, DP2], ids=["one", "TP2", "PP2", "DP2"])
def test_state_comes_back_at_any_layout(saved: Path, tiny_hf: Path, layout: ParallelConfig) -> None:
    result = launch(
        workers.state_after_load, str(tiny_hf), str(step_directory(saved, 20)), layout, processes=layout.world_size
    )
    assert result["state"] == {
        "step": 20,
        "consumed_samples": 200,
        "consumed_tokens": 20_000,
        "seconds": 0.5,
        "extra": {"cursor": [20]},
    }
    if result["final_norm"] is not None:
        assert torch.equal(result["final_norm"], all_tensors(tiny_hf)["model.norm.weight"])


def test_generator_continues_at_the_same_layout(run: tuple[Path, dict[int, torch.Tensor]], tiny_hf: Path) -> None:
    folder, drawn = run
    assert not torch.equal(drawn[10], drawn[20])
    for step in (10, 20):
        result = launch(workers.state_after_load, str(tiny_hf), str(step_directory(folder, step)), ONE)
        assert torch.equal(result["drawn"], drawn[step])


@pytest.mark.parametrize(
    ("before", "after"),
    [(PP2, ONE), (ONE, PP2), (DP2, ONE), (ONE, DP2)],
    ids=["PP2-one", "one-PP2", "DP2-one", "one-DP2"],
)
def test_moments_and_weights_find_their_parameters(
    tied_hf: Path, tmp_path: Path, before: ParallelConfig, after: ParallelConfig
) -> None:
    """A tied embedding gets a padded bucket of its own in a pipeline, which Megatron counts in one place and not in
    another: without the mend in runtime/faults.py every later parameter is saved shifted, and loads without a word.
    """
    checkpoint = str(tmp_path / "checkpoint")
    launch(workers.save_with_moments, str(tied_hf), checkpoint, before, processes=before.world_size)
    args = (str(tied_hf), checkpoint, after)
    assert launch(workers.wrong_moments_after_load, *args, processes=after.world_size) == []


def test_latest_is_the_newest_complete_one(checkpoints: Path) -> None:
    assert find_latest(checkpoints) == step_directory(checkpoints, 20)
    (checkpoints / "step_00000030.tmp-1").mkdir()
    step_directory(checkpoints, 40).mkdir()
    assert find_latest(checkpoints) == step_directory(checkpoints, 20)
    largest = max(step_directory(checkpoints, 20).glob("*.distcp"), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    assert find_latest(checkpoints) == step_directory(checkpoints, 10)
    (step_directory(checkpoints, 10) / MANIFEST).unlink()
    assert find_latest(checkpoints) is None


def test_no_checkpoints_no_latest(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "none") is None


def test_steps_sort_as_numbers(tmp_path: Path) -> None:
    names = [step_directory(tmp_path, step).name for step in (9, 10, 99, 100, 25_000)]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("how", "rank", "layout", "message"),
    [
        ("full", 0, ONE, "No space left on device.*earlier checkpoints are untouched"),
        ("error", 0, TP2, "the writer died.*earlier checkpoints are untouched"),
        ("full", 1, TP2, "No space left on device.*earlier checkpoints are untouched"),
        ("killed", 0, ONE, "rank 0 ended without a message"),
        ("killed", 1, TP2, "rank 1 ended without a message"),
    ],
    ids=["disk full", "error on rank 0 of 2", "disk full on rank 1 of 2", "killed", "rank 1 of 2 killed"],
)
def test_failed_save_leaves_the_one_before(
    checkpoints: Path, tiny_hf: Path, how: str, rank: int, layout: ParallelConfig, message: str
) -> None:
    args = (str(tiny_hf), str(checkpoints), 30, how, rank, layout)
    with pytest.raises(PrismError, match=message) as caught:
        launch(workers.save_that_fails, *args, processes=layout.world_size)
    assert not isinstance(caught.value, InputError)
    assert not step_directory(checkpoints, 30).exists()
    latest = find_latest(checkpoints)
    assert latest == step_directory(checkpoints, 20)
    assert launch(workers.state_after_load, str(tiny_hf), str(latest), ONE)["state"]["step"] == 20


def test_next_save_clears_what_a_killed_one_left(checkpoints: Path, tiny_hf: Path) -> None:
    with pytest.raises(PrismError):
        launch(workers.save_that_fails, str(tiny_hf), str(checkpoints), 30, "killed", 0, ONE)
    assert [p.name for p in checkpoints.glob("*.tmp-*")]
    launch(workers.saved_by_training, str(tiny_hf), str(checkpoints), ONE, [30])
    assert not list(checkpoints.glob("*.tmp-*"))
    assert find_latest(checkpoints) == step_directory(checkpoints, 30)


def test_save_under_an_existing_name_is_refused(tiny_hf: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights: already exists"):
        launch(workers.save_weights, str(tiny_hf), str(tmp_path / "weights"), 2)
    assert read_manifest(tmp_path / "weights")["has_optimizer"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_save_where_no_folder_can_be_made(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/checkpoint.*cannot be created: Not a directory"):
        launch(workers.save_weights, str(tiny_hf), str(tmp_path / "file/checkpoint"))


def test_weights_alone_cannot_resume_training(tiny_hf: Path, tmp_path: Path) -> None:
    launch(workers.save_weights, str(tiny_hf), str(tmp_path / "weights"))
    with pytest.raises(InputError, match="holds weights only, so training cannot resume"):
        launch(workers.state_after_load, str(tiny_hf), str(tmp_path / "weights"), ONE)


def test_checkpoint_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    """Fewer layers: Megatron would fill what fits and say nothing."""
    other = save_tiny_llama(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(PrismError) as caught:
        launch(workers.load_into, str(other), str(step_directory(saved, 20)))
    assert isinstance(caught.value, InputError), caught.value


def test_damaged_checkpoint_is_named_before_loading(checkpoints: Path, tiny_hf: Path) -> None:
    broken = step_directory(checkpoints, 20)
    file = next(broken.glob("*.distcp"))
    file.unlink()
    with pytest.raises(InputError, match=f"{file.name}: missing from the checkpoint"):
        launch(workers.load_into, str(tiny_hf), str(broken))
