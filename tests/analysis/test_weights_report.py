"""`analyze weights` as a whole: native checkpoints, lineage, trajectories, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_workers import same_within_a_process
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from prism_nemo.analysis import weights
from prism_nemo.analysis.lineage import schedule_of, stage_between
from prism_nemo.analysis.nulls import Schedule
from prism_nemo.analysis.spectrum import spectrum_of
from prism_nemo.analysis.weights import compare_weights
from prism_nemo.analysis.weights_report import WeightsSettings, analyze_weights, transition_of
from prism_nemo.analysis.weights_view import MIN_WIDTH, weights_view
from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import MidtrainConfig, ParallelConfig, RLConfig, to_yaml
from prism_nemo.errors import InputError
from prism_nemo.runtime.launch import launch
from prism_nemo.training.schedule import learning_rate

FAMILIES = ("llama", "granite-hybrid", "nemotron-h")


def moved(source: Path, to: Path, scale: float, seed: int = 0, shrink: float = 1.0) -> Path:
    """A copy whose weights shrank and moved at random."""
    generator = torch.Generator().manual_seed(seed)
    to.mkdir()
    tensors = load_file(source / "model.safetensors")
    after = {n: shrink * t + scale * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file(after, to / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            (to / name).write_bytes((source / name).read_bytes())
    return to


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, and two checkpoints that came of it."""
    root = tmp_path_factory.mktemp("models")
    base = save_tiny("llama", root / "base")
    mid = moved(base, root / "mid", 0.02, 1, shrink=0.95)
    return {"base": base, "mid": mid, "rl": moved(mid, root / "rl", 2e-4, 2), "other": moved(base, root / "o", 2e-4, 3)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_native_checkpoint_has_the_same_weights(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored for two tensor-parallel ranks and with a padded vocabulary, read a few rows at a time; against a moved
    copy, tensor by tensor.
    """
    monkeypatch.setattr(weights, "_BLOCK", 500)
    hf = save_tiny(family, tmp_path / "hf")
    native = tmp_path / "native"
    import_hf(hf, native, ParallelConfig(tensor_model_parallel_size=2))
    same = compare_weights(hf, native)
    assert same.total.equal_fraction == 1
    assert set(same.tensors) == set(compare_weights(hf, hf).tensors)
    # In a process that has its groups, as the study's cells do: the same, and the groups stay.
    assert launch(same_within_a_process, str(hf), str(native)) == (1, set())
    other = moved(hf, tmp_path / "moved", 0.01)
    assert compare_weights(native, other).tensors == compare_weights(hf, other).tensors
    (native / ".metadata").rename(tmp_path / "kept")
    with pytest.raises(InputError, match="no checkpoint here"):
        compare_weights(hf, native)


def midtrain_run(path: Path, **changes: Any) -> Path:
    """A run directory as mid-training leaves it, without its checkpoints."""
    config = MidtrainConfig(run_dir=str(path), train_steps=10, **changes)
    config.data.path = "data"
    config.optimizer.lr, config.optimizer.weight_decay = 1e-2, 0.1
    config.schedule.lr_warmup_steps, config.schedule.decay, config.schedule.min_lr_ratio = 2, "linear", 0.0
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(1, 9)))
    return path


def test_a_schedule_is_read_from_the_run(tmp_path: Path) -> None:
    """Warm-up of 2 steps, then linearly to nothing at step 10, of which 8 were done."""
    run = midtrain_run(tmp_path / "run")
    rates = [5e-3, 1e-2, *(1e-2 * (1 - k / 8) for k in range(6))]
    assert schedule_of(run) == Schedule.of(rates, 0.1)
    assert schedule_of(run, 2, 4) == Schedule.of(rates[2:4], 0.1)
    rl = RLConfig(run_dir="r", init_from="i", tokenizer="t", train_steps=2)
    rl.grpo.mini_batches, rl.grpo.epochs = 2, 3
    (run / "config.yaml").write_text(to_yaml(rl))
    assert schedule_of(run, 0, 2).steps == 12
    # No group of the first step had anything to tell apart, and one update of the second was left out.
    lines = [{"step": 1, "updates": 0}, {"step": 2, "updates": 5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rate = learning_rate(rl.schedule, rl.optimizer.lr, 1, 2)
    assert schedule_of(run) == Schedule.of([rate] * 5, rl.optimizer.weight_decay)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="no step is recorded"):
        schedule_of(run)
    with pytest.raises(InputError, match=r"no config\.yaml there"):
        schedule_of(tmp_path)


def test_the_stage_between_two_native_checkpoints_is_found(tmp_path: Path) -> None:
    start = tmp_path / "start"
    run = midtrain_run(tmp_path / "run", init_from=str(start))
    steps = [run / "checkpoints" / f"step_{step:08d}" for step in (4, 8)]
    assert stage_between(start, steps[1]) == schedule_of(run, 0, 8)
    assert stage_between(*steps) == schedule_of(run, 4, 8)
    assert stage_between(steps[1], steps[0]) is None
    assert stage_between(tmp_path / "elsewhere", steps[0]) is None
    assert stage_between(start, tmp_path / "hf") is None


def test_nulls_stand_beside_what_was_observed(models: dict[str, Path], tmp_path: Path) -> None:
    """Weights that shrank by 5 %: decay alone explains the drift and not the rest."""
    run = midtrain_run(tmp_path / "run")
    report = analyze_weights(WeightsSettings([models["base"], models["mid"], models["rl"]], runs=[str(run), "-"]))
    names = [t.name for t in report.transitions]
    assert names == ["base -> mid", "mid -> rl", "base -> rl"]
    first, second, both = report.transitions
    assert first.comparison.total.drift == pytest.approx(-0.05, abs=0.005)
    assert [null.name for null in first.nulls["total"]] == ["decay", "random_walk", "drift", "fitted"]
    assert [null.name for null in first.nulls["norm"]] == ["random_walk", "drift", "fitted"]
    decay = first.nulls["attention.q"][0]
    assert decay.drift == pytest.approx(schedule_of(run).decay_factor - 1)
    assert [null.name for null in second.nulls["total"]] == ["fitted"]
    assert both.schedule is None  # one of its stages is not known
    fitted = first.nulls["mlp.up"][-1]
    seen = first.comparison.by_subcomponent["mlp.up"]
    assert fitted.thresholds["1"] == pytest.approx(seen.thresholds["1"], abs=1e-3)
    console = Console(width=MIN_WIDTH, record=True)
    console.print(weights_view(report))
    text = console.export_text()
    for word in ("base -> mid", "decay alone", "fitted", "attention.q", "Distance from the first checkpoint"):
        assert word in text
    assert all(len(line.rstrip()) <= MIN_WIDTH for line in text.splitlines())


def test_two_ways_to_rl_are_compared(models: dict[str, Path]) -> None:
    """MT to RL beside base to RL: the same size, and neither the direction nor the place."""
    settings = WeightsSettings(
        [models["base"], models["mid"], models["rl"]], transitions=[(models["base"], models["other"])]
    )
    report = analyze_weights(settings)
    a, b = (i for i, t in enumerate(report.transitions) if t.name in ("mid -> rl", "base -> o"))
    one, two = report.transitions[a].comparison.total, report.transitions[b].comparison.total
    assert one.update_norm == pytest.approx(two.update_norm, rel=0.02)
    overlap = report.overlaps[a, b].total
    assert overlap.cosine == pytest.approx(0, abs=0.03)
    assert overlap.jaccard["1"] == pytest.approx(overlap.by_size_of_weight["1"], rel=0.3)
    assert [row["share_of_final_distance"] for row in report.trajectory][-1] == 1


def test_tables_are_tidy_and_equal(models: dict[str, Path], tmp_path: Path) -> None:
    report = analyze_weights(WeightsSettings([models["base"], models["mid"]], spectrum=True))
    written = report.write(tmp_path / "out")
    assert [path.suffix for path in written] == [".json", ".jsonl", ".parquet", ".html"]
    rows = [json.loads(line) for line in written[1].read_text().splitlines()]
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(written[2]).to_pylist() == rows
    page = written[3].read_text()
    assert page.count("<svg") == 4  # thresholds, components, tenths, layers
    assert "http://" not in page.replace("http://www.w3.org", "")
    total = report.transitions[0].comparison.total
    assert f"changed by more than 1 % observed: {100 * total.thresholds['1']:.1f}" in page
    found = {(row["measure"], row["null"]): row["value"] for row in rows if row["scope"] == "total"}
    assert found["changed_1pct", None] == total.thresholds["1"]
    assert found["relative_l2", None] == total.relative_l2
    assert ("changed_5pct", "fitted") in found
    assert {row["scope"] for row in rows} == {"total", "group", "component", "layer", "tensor"}
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(report.to_dict()))
    assert set(report.transitions[0].spectra) == {
        name for name, size in load_file(models["base"] / "model.safetensors").items() if size.dim() == 2
    }


def test_the_spectrum_knows_one_direction_from_noise() -> None:
    """Exactly for small matrices; for larger ones the largest values to 1 %, against torch's full factorisation."""
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    one = spectrum_of(torch.outer(noise(50), noise(80)))
    assert one is not None
    assert one.stable_rank == pytest.approx(1)
    assert one.participation == pytest.approx(1)
    for size in ((60, 90), (600, 400)):
        u = noise(*size) + 3 * torch.outer(noise(size[0]), noise(size[1]))
        found, values = spectrum_of(u), torch.linalg.svdvals(u.double())
        assert found is not None
        square = float(values.square().sum())
        assert found.frobenius**2 == pytest.approx(square, rel=1e-5)
        assert found.participation == pytest.approx(square**2 / float(values.pow(4).sum()), rel=1e-4)
        assert found.values == pytest.approx(values[:16].tolist(), rel=0.03)
        assert found.values[0] == pytest.approx(float(values[0]), rel=1e-4)
    random = spectrum_of(noise(600, 400))
    assert random is not None
    assert random.participation == pytest.approx(random.random_participation, rel=0.02)
    assert spectrum_of(torch.zeros(3, 4)) is None


def test_transitions_are_two_folders(tmp_path: Path) -> None:
    odd = tmp_path / "a:b"
    odd.mkdir()
    assert transition_of(f"{odd}:{tmp_path}") == (odd, tmp_path)
    with pytest.raises(InputError, match="expected FROM:TO"):
        transition_of(str(tmp_path))
    with pytest.raises(InputError, match="two checkpoints that exist"):
        transition_of(f"{tmp_path}:{tmp_path / 'none'}")
