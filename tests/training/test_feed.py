"""The data of a run: what its log says was read, and what happens when the data changes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_training import STEPS, column, midtrain_config, numbers, write_texts
from training_workers import midtrain_interrupted

from prism_nemo.config import MidtrainConfig
from prism_nemo.data.build import build_mixture
from prism_nemo.data.manifest import load_manifest
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.plan import make_plan
from prism_nemo.data.samples import Samples
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.errors import InputError, StoppedEarly
from prism_nemo.runtime.launch import launch
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
