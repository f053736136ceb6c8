"""The data of a run: what its log says was read, and what happens when the data changes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import STEPS, column, midtrain_config, numbers, write_texts
from training_workers import midtrain_interrupted

from prism_nemo.config import DataConfig, MidtrainConfig, ParallelConfig
from prism_nemo.data.build import build_mixture
from prism_nemo.data.manifest import load_manifest
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.plan import make_plan
from prism_nemo.data.samples import Samples
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.errors import InputError, StoppedEarly
from prism_nemo.runtime.launch import launch
from prism_nemo.training.feed import held_out_batch, open_held_out, validation_micro_batches
from prism_nemo.training.midtrain import check, midtrain


def _run(config: MidtrainConfig) -> dict[str, Any]:
    return dict(launch(midtrain, config, processes=config.parallel.world_size))


def _stop_after(config: MidtrainConfig, steps: int) -> None:
    with pytest.raises(StoppedEarly):
        launch(midtrain_interrupted, config, steps, "stop", processes=config.parallel.world_size)


def _lineage(config: MidtrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.run_dir) / "lineage.json").read_text())


def test_the_log_says_what_was_read(run_of: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    """Counted again from the samples, and the losses from each other."""
    run, manifest = run_of("TP1"), load_manifest(data)
    plan = make_plan(manifest, seq_length=32, seed=1234, packing="best_fit")
    samples = Samples(manifest, plan, tmp_path)
    samples.prepare(0, STEPS * 8)
    text: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for step, line in enumerate(line for line in numbers(run) if "loss" in line):
        batch = samples.rows(step * 8, 8)
        in_loss: Counter[str] = Counter()
        counted = batch["loss_mask"].view(8, -1).sum(1).tolist()
        for number, tokens, mask in zip(batch["sources"].tolist(), batch["text_tokens"].tolist(), counted, strict=True):
            text[samples.names[number]] += tokens
            rows[samples.names[number]] += 1
            in_loss[samples.names[number]] += int(mask)
        assert line["tokens"] == sum(text.values())
        assert {name: line[f"tokens/{name}"] for name in samples.names} == text
        for drawn in plan.sources:
            assert line[f"epoch/{drawn.name}"] == pytest.approx(rows[drawn.name] / drawn.rows_per_epoch, abs=1e-4)
        mean = sum(line[f"loss/{name}"] * tokens for name, tokens in in_loss.items()) / sum(in_loss.values())
        assert mean == pytest.approx(line["loss"], abs=1e-6)
    assert text["letters"] / sum(text.values()) == pytest.approx(0.7, abs=0.02)
    # The digits are the harder text, ten against six: the two losses are not one number written twice.
    assert column(run, "loss/digits")[-1] > column(run, "loss/letters")[-1] + 0.1


def test_losses_between_two_lines_are_kept_over_a_stop(data: Path, initial: Path, tmp_path: Path) -> None:
    """Lines every four steps, stopped in the middle of such a stretch."""
    config = midtrain_config(tmp_path / "run", data, initial, log_interval=4)
    undisturbed = midtrain_config(tmp_path / "whole", data, initial, log_interval=4)
    _stop_after(config, 6)
    _run(config)
    _run(undisturbed)
    assert numbers(config.run_dir) == numbers(undisturbed.run_dir)
    assert [line["step"] for line in numbers(config.run_dir) if "loss" in line] == [1, 4, 8, 10]


def _other_mixture(data: Path, folder: Path, letters: float) -> Path:
    """The same letters at another share, no digits, and new text instead."""
    root = data.parent
    sources = [
        Source("letters", "general", [str(root / "letters.jsonl")], letters),
        Source("more", "math", [str(write_texts(folder / "more.jsonl", "uvwxyz", 40))], 1 - letters),
        Source("held", "general", [str(root / "held.jsonl")], 0.0),
    ]
    build_mixture(Mixture("other", sources), load_tokenizer(root / "tokenizer"), folder / "tokens")
    return folder / "tokens"


def test_another_mixture_in_mid_run_has_to_be_asked_for_and_is_recorded(
    run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path
) -> None:
    config = midtrain_config(tmp_path / "run", data, initial)
    _stop_after(config, 4)
    before = numbers(config.run_dir)
    other = _other_mixture(data, tmp_path, 0.4)
    config.data.path = str(other)
    with pytest.raises(
        InputError, match=r"digits is no longer drawn from; letters has 40\.00%.*more is new.*change_mixture=true"
    ) as refused:
        _run(config)
    assert refused.value.exit_code == 2
    config.data.change_mixture = True
    _stop_after(config, 3)
    config.data.change_mixture = False  # once is enough
    _run(config)
    lines = [line for line in numbers(config.run_dir) if "loss" in line]
    assert lines[:4] == [line for line in before if "loss" in line]
    # Letters go on where they were; what is read now is counted from here.
    assert lines[4]["tokens/letters"] > lines[3]["tokens/letters"]
    assert lines[-1]["tokens/more"] > lines[-1]["tokens/letters"] - lines[3]["tokens/letters"] > 0
    assert "tokens/digits" not in lines[4]
    changes = [event for event in _lineage(config)["events"] if event["event"] == "mixture changed"]
    assert [(event["step"], event["sample"]) for event in changes] == [(4, 32)]
    assert "digits is no longer drawn from" in changes[0]["what"]
    plans = [event["plan"] for event in _lineage(config)["events"] if event["event"] == "data"]
    assert len(plans) == 2
    assert plans[1] == changes[0]["plan"]


def test_the_order_cannot_change_under_a_run(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial)
    _stop_after(config, 1)
    config.seed = 99
    with pytest.raises(InputError, match=r"seed is 99, but this run was started with 1234"):
        _run(config)
    config.seed = 1234
    config.data.packing = "concatenate"
    with pytest.raises(InputError, match=r"packing is concatenate, but this run was started with best_fit"):
        _run(config)


def test_a_moved_build_is_the_same_data(run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial)
    _stop_after(config, 3)
    shutil.copytree(data, tmp_path / "moved")
    config.data.path = str(tmp_path / "moved")
    _run(config)
    assert numbers(config.run_dir) == numbers(run_of("TP1"))


def test_an_index_may_be_shared(run_of: Callable[..., Path], data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, train_steps=2)
    config.data.index_dir = str(tmp_path / "shared")
    _run(config)
    assert not (tmp_path / "run" / "index").exists()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("*.npy")}
    config.run_dir = str(tmp_path / "second")
    _run(config)
    assert made
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("*.npy")}


def test_a_source_that_would_be_repeated_too_often_is_refused_first(data: Path, initial: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(data, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sources"][1]["max_epochs"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"digits: .* epochs, max_epochs 2\. Train on fewer tokens"):
        check(midtrain_config(tmp_path / "run", folder, initial, train_steps=10_000))


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("rows", "size", "parallel", "micro_batches"),
    [
        (8, 2, ParallelConfig(), 4),
        (7, 2, ParallelConfig(), 4),
        (7, 3, ParallelConfig(data_parallel_size=2), 2),
        (2, 4, ParallelConfig(data_parallel_size=3), 1),
        (5, 1, ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), 6),
    ],
)
def test_validation_counts_every_row_once_in_every_layout(
    rows: int, size: int, parallel: ParallelConfig, micro_batches: int, isolate: bool, data: Path, tmp_path: Path
) -> None:
    config = midtrain_config(tmp_path, data, None, micro_batch_size=size, parallel=parallel)
    config.data = DataConfig(str(data), "held", validation_rows=rows, isolate_documents=isolate)
    held_out = open_held_out(config)
    assert validation_micro_batches(config) == micro_batches
    number = micro_batches * parallel.data_parallel_size
    batches = [held_out_batch(held_out, config, i) for i in range(number)]
    whole = held_out.batch(0, rows)
    assert whole["loss_mask"].view(rows, -1).sum(1).min() > 0
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        together = torch.cat([batch[name].view(size, -1) for batch in batches])
        assert together.shape == (number * size, config.seq_length)
        assert torch.equal(together[:rows], whole[name].view(rows, -1))
        if name == "loss_mask":
            assert not together[rows:].any()
    assert torch.cat([batch["text_tokens"] for batch in batches])[rows:].sum() == 0
    for batch in batches:
        assert ("cu_seqlens" in batch) is isolate
        if isolate:
            bounds = batch["cu_seqlens"].tolist()
            assert batch["tokens"].shape == (1, size * config.seq_length)
            assert (bounds[0], bounds[-1]) == (0, size * config.seq_length)
            positions = batch["position_ids"][0].tolist()
            assert positions == [i for a, b in pairwise(bounds) for i in range(b - a)]


def test_validation_is_the_same_where_a_rank_has_nothing_but_filling(data: Path, initial: Path, tmp_path: Path) -> None:
    """Three rows, one by one; and four at a time on two ranks, the second of which has none."""
    found = []
    for parallel, size in ((ParallelConfig(), 1), (ParallelConfig(data_parallel_size=2), 4)):
        run = tmp_path / str(size)
        config = midtrain_config(run, data, initial, parallel=parallel, micro_batch_size=size, train_steps=1)
        config.data.validation_rows = 3
        _run(config)
        found += column(run, "validation_loss")
    assert len(found) == 2
    assert found[1] == pytest.approx(found[0], abs=1e-5)
