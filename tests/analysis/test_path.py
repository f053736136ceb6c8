"""Points between models: the weights there, their loss against transformers', barriers, and going on after a kill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analysis_workers import between, rates_of_known_answers
from tiny_llama import all_tensors
from tiny_models import hf_model, save_tiny
from tiny_stages import moved_copy, stages
from tiny_training import character_tokenizer

from prism_nemo.analysis.merge import MergeSettings, merge_models
from prism_nemo.analysis.path import PathSettings, PointLog, analyze_path, path_lines
from prism_nemo.analysis.path_points import Point, barrier, fractions_of, path_points, segments_of
from prism_nemo.analysis.sampled import AnswerSettings
from prism_nemo.config import ParallelConfig
from prism_nemo.data.held_out import held_out_rows
from prism_nemo.errors import InputError
from prism_nemo.runtime.launch import launch


def test_points_of_the_study() -> None:
    """Figure of section 10: 7 points to the mid-trained model, 4 more to the RL model, and a 5 x 5 grid."""
    points = path_points(3, fractions_of(7, "first"), fractions_of(5, "second"), 0)
    assert points[:7] == [Point(i / 6, 0.0) for i in range(7)]
    assert points[7:] == [Point(1.0, b) for b in (0.25, 0.5, 0.75, 1.0)]
    whole = path_points(3, fractions_of(7, "first"), fractions_of(5, "second"), 5)
    assert len(whole) == len(set(whole)) == 11 + 25 - 3 - 4  # alpha 0, 0.5, 1 at beta 0, and 4 at alpha 1, are there
    assert {p for p in whole if p.alpha in (0, 0.25, 0.5, 0.75, 1) and p.beta in (0, 0.25, 0.5, 0.75, 1)} == {
        Point(a / 4, b / 4) for a in range(5) for b in range(5)
    }
    assert path_points(2, [0.0, 0.5, 1.0], [0.0, 1.0], 0) == [Point(0, 0), Point(0.5, 0), Point(1, 0)]


def test_shares_are_the_formula() -> None:
    base, mid, rl = 2.0, 5.0, 11.0
    for alpha, beta in ((0, 0), (1, 0), (1, 1), (0.25, 0.75), (0.5, 0.5)):
        shares = Point(alpha, beta).shares
        found = shares[0] * base + shares[1] * mid + shares[2] * rl
        assert found == pytest.approx(base + alpha * (mid - base) + beta * (rl - mid))


def test_fractions() -> None:
    assert fractions_of((0.5, 0.25), "first") == [0.0, 0.25, 0.5, 1.0]
    for given, match in ((1, "at least 2"), ((1.5,), "0 to 1"), ((0.5, 0.5), "once"), ((float("nan"),), "0 to 1")):
        with pytest.raises(InputError, match=match):
            fractions_of(given, "first")
    for arguments, match in (
        ((4, [0.0, 1.0], [0.0, 1.0], 0), "2 or 3"),
        ((2, [0.0, 1.0], [0.0, 1.0], 3), "three models"),
        ((3, [0.0, 1.0], [0.0, 1.0], 1), "at least 2"),
    ):
        with pytest.raises(InputError, match=match):
            path_points(*arguments)


def test_barrier_is_the_rise_above_the_line() -> None:
    points = path_points(3, [0.0, 0.5, 0.75, 1.0], [0.0, 0.5, 1.0], 0)
    segments = segments_of(3, points)
    assert [fraction for fraction, _ in segments["A-B"]] == [0.0, 0.5, 0.75, 1.0]
    assert [fraction for fraction, _ in segments["B-C"]] == [0.0, 0.5, 1.0]
    rows = {
        Point(0, 0): [4.0, 2.0],
        Point(0.5, 0): [3.5, 1.5],  # the line: 3, 1.5
        Point(0.75, 0): [3.5, 1.0],  # the line: 2.5, 1.25
        Point(1, 0): [2.0, 1.0],
        Point(1, 0.5): [1.4, 0.9],  # below the line
        Point(1, 1): [1.0, 1.0],
    }
    found = barrier(segments["A-B"], rows, [10.0, 30.0], 0.95)
    # By tokens: (10 * 0.5 + 30 * 0) / 40 = 0.125, and (10 * 1 - 30 * 0.25) / 40 = 0.0625.
    assert found["height"] == pytest.approx(0.125)
    assert found["at"] == 0.5
    assert found["low"] < found["height"] < found["high"]
    assert barrier(segments["B-C"], rows, [10.0, 30.0], 0.95) == {"height": 0.0, "at": None, "low": None, "high": None}


def test_weights_at_points(tmp_path: Path) -> None:
    """Ends bit for bit, whatever came before; elsewhere the formula. Tied embeddings, Mamba mixers, fused weights."""
    first = save_tiny("granite-hybrid", tmp_path / "a")
    folders = [first, moved_copy(first, tmp_path / "b", 0.5, seed=1), moved_copy(first, tmp_path / "c", 0.5, seed=2)]
    points = [Point(0.3, 0.2), Point(0, 0), Point(1, 0), Point(1, 1), Point(0.3, 0.2)]
    found = launch(between, [str(folder) for folder in folders], [point.shares for point in points])
    a, b, c = (all_tensors(folder) for folder in folders)
    for own, end in zip(found[1:4], (a, b, c), strict=True):
        assert own.keys() == end.keys()
        assert all(torch.equal(own[name], end[name]) for name in end)
    for own in (found[0], found[4]):
        for name in a:
            expected = a[name] + 0.3 * (b[name] - a[name]) + 0.2 * (c[name] - b[name])
            assert torch.allclose(own[name], expected, atol=1e-6)


def test_pass_rate_is_that_of_the_answers(tmp_path: Path) -> None:
    """Two of three answers to the first question, none to the second, all to the third, one to the fourth."""
    tokenizer = character_tokenizer(tmp_path)
    settings = AnswerSettings(tasks=("arithmetic",), questions=4, samples=3, max_new_tokens=20)
    right = {(0, 0), (0, 2), (2, 0), (2, 1), (2, 2), (3, 1)}
    rate = launch(rates_of_known_answers, str(tokenizer.path), settings, right)["arithmetic"]
    assert rate["questions"] == pytest.approx([2 / 3, 0, 1, 1 / 3])
    assert rate["value"] == pytest.approx(0.5)
    assert rate["low"] < 0.5 < rate["high"]
    assert rate["failures"] == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    return stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def settings(models: tuple[list[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> PathSettings:
    folders, data = models
    return PathSettings(
        models=tuple(map(str, folders)),
        out=str(tmp_path_factory.mktemp("out") / "path"),
        first=(0.5,),
        second=2,
        data=str(data),
        rows=12,
        seq_length=24,
        answers=AnswerSettings(tasks=("arithmetic",), questions=4, samples=2, max_new_tokens=4),
    )


@pytest.fixture(scope="module")
def result(settings: PathSettings) -> dict[str, Any]:
    return analyze_path(settings)


def loss_of(folder: Path, data: Path) -> float:
    tokens, labels = held_out_rows(data, "held", 24, 12)
    with torch.no_grad():
        logits = hf_model(folder)(tokens).logits
    return float(F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten()))


def test_losses_are_those_of_the_models(
    result: dict[str, Any], models: tuple[list[Path], Path], tmp_path: Path
) -> None:
    """Of transformers, at the ends on the models' own files, and between them on a merge."""
    folders, data = models
    merge_models(MergeSettings((str(folders[0]), str(folders[1])), str(tmp_path / "half"), weights=(0.5,)))
    losses = {(r["alpha"], r["beta"]): r for r in result["rows"] if r["measure"] == "loss"}
    assert losses.keys() == {(0, 0), (0.5, 0), (1, 0), (1, 1)}
    expected = [loss_of(folder, data) for folder in (folders[0], tmp_path / "half", *folders[1:])]
    for row, loss in zip(losses.values(), expected, strict=True):
        assert row["value"] == pytest.approx(loss, abs=1e-4)
        assert row["low"] < row["value"] < row["high"]
        assert row["questions"] == 12
    assert len({round(loss, 2) for loss in expected}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [ParallelConfig(2, 1), ParallelConfig(1, 2), ParallelConfig(1, 1, 2)])
def test_any_layout_gives_the_same(
    parallel: ParallelConfig, result: dict[str, Any], settings: PathSettings, tmp_path: Path
) -> None:
    found = analyze_path(dataclasses.replace(settings, out=str(tmp_path / "out"), parallel=parallel))
    assert [row["name"] for row in found["rows"]] == [row["name"] for row in result["rows"]]
    for ours, theirs in zip(found["rows"], result["rows"], strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], abs=1e-4)


def test_the_rest_of_the_result(result: dict[str, Any], settings: PathSettings) -> None:
    rates = [row for row in result["rows"] if row["measure"] == "pass_rate"]
    assert [(row["name"], row["questions"]) for row in rates] == [("arithmetic", 4)] * 4
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rates)
    assert [(row["segment"], row["name"]) for row in result["barriers"]] == [("A-B", "held"), ("B-C", "held")]
    losses = [row["value"] for row in result["rows"] if row["measure"] == "loss"]
    rise = losses[1] - (losses[0] + losses[2]) / 2
    assert result["barriers"][0]["height"] == pytest.approx(max(0.0, rise))
    assert result["barriers"][1]["at"] is None  # no point between B and C
    assert json.loads((Path(settings.out) / "path.json").read_text())["rows"] == result["rows"]
    assert len(path_lines(result)) == 4 + 4 + 2


def test_goes_on_where_it_was(result: dict[str, Any], settings: PathSettings, tmp_path: Path) -> None:
    """Points on disk are not measured again (one is marked to see that), half a line is, and a new point is added."""
    lines = (Path(settings.out) / "points.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4
    marked = json.loads(lines[1])
    marked["measured"]["loss"]["held"]["value"] = 123.0
    out = tmp_path / "out"
    out.mkdir()
    (out / "points.jsonl").write_text("\n".join([lines[0], json.dumps(marked), lines[2], lines[3][:40]]))
    again = analyze_path(dataclasses.replace(settings, out=str(out), second=(0.25,)))
    losses = {(r["alpha"], r["beta"]): r["value"] for r in again["rows"] if r["measure"] == "loss"}
    before = {(r["alpha"], r["beta"]): r["value"] for r in result["rows"] if r["measure"] == "loss"}
    assert losses[0, 0] == 123.0
    assert losses[1, 0] == before[1, 0]
    assert losses[1, 1] == before[1, 1]
    assert (1, 0.25) in losses
    rows = [json.loads(line) for line in (out / "points.jsonl").read_text().splitlines()]
    assert {(row["alpha"], row["beta"]) for row in rows[1:]} == losses.keys()  # nothing stands behind half a line


def test_a_log_of_other_settings_is_refused(tmp_path: Path) -> None:
    log = PointLog(tmp_path / "points.jsonl", {"rows": 5, "hashes": ["a"]})
    log.add(Point(0.0, 0.0), {"loss": {}})
    assert PointLog(tmp_path / "points.jsonl", {"rows": 5, "hashes": ["a"]}).found == {Point(0, 0): {"loss": {}}}
    for key, match in (({"rows": 6, "hashes": ["a"]}, r"\(rows\)"), ({"rows": 5, "hashes": ["b"]}, r"\(hashes\)")):
        with pytest.raises(InputError, match=match):
            PointLog(tmp_path / "points.jsonl", key)


def test_refusals(settings: PathSettings, tmp_path: Path) -> None:
    deeper = save_tiny("llama", tmp_path / "deeper", num_hidden_layers=5)
    base = settings.models[0]
    for changes, match in (
        ({"models": (base,)}, "2 or 3"),
        ({"models": (base, str(deeper))}, "num_layers: 4, 5"),
        ({"data": None, "answers": AnswerSettings()}, "nothing to measure"),
        ({"sources": ("nothing",)}, "nothing"),
        ({"seq_length": 193}, "193 tokens"),
        ({"answers": AnswerSettings(tasks=("nothing",))}, "nothing"),
        ({"answers": AnswerSettings(tasks=("arithmetic",), temperature=0.0, samples=2)}, "temperature 0"),
        ({"answers": AnswerSettings(tasks=("arithmetic",), gate="some")}, "some"),
        ({"parallel": ParallelConfig(tensor_model_parallel_size=3)}, "tensor_model_parallel_size 3"),
    ):
        with pytest.raises(InputError, match=match):
            analyze_path(dataclasses.replace(settings, **changes))
