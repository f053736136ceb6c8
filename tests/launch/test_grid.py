from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prism_nemo.config import MidtrainConfig, RLConfig, load_yaml, resolve
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.catalog import CATALOG
from recipes import grid
from recipes.pipeline import Route, pipeline, stages_of


def test_the_grid_is_the_studys() -> None:
    """Rows of its tables, counted from the text: 4 + 14 + 6 + 4 + 4 + 18 + 1 + 3 + 4 + 4."""
    rows = {experiment.name: len(experiment.routes) for experiment in grid.EXPERIMENTS}
    assert rows == {
        "domains": 4,
        "models": 14,
        "rl": 6,
        "rl-balanced": 4,
        "rl-from-base": 4,
        "mixtures": 18,
        "timing": 1,
        "context": 3,
        "budget": 4,
        "long-context": 4,
    }
    routes = grid.expand()
    assert {route.model for route in routes} == set(CATALOG)
    # Shared by several tables, made once.
    assert routes[Route("granite-3.3-8b", "mcs")] == ["domains", "models", "mixtures"]
    assert routes[Route("granite-4.0-micro", "mcs")] == ["models", "timing", "context"]
    tokens = [route.steps * 1_048_576 / 1e9 for route in grid.expand(["budget"])]
    assert tokens == pytest.approx([10.49, 15.73, 26.21, 31.46], abs=0.006)  # as the study rounds them


def test_every_run_of_the_grid_fits_and_each_stage_comes_after_what_it_needs(tmp_path: Path) -> None:
    found = grid.stages(list(grid.expand()), "h100x64", tmp_path)
    seen: set[str] = set()
    for stage in found:
        assert set(stage.after) <= seen, stage.name
        seen.add(stage.name)
    training = [stage for stage in found if stage.verb in ("midtrain", "rl")]
    directories = [stage.config.run_dir for stage in training if isinstance(stage.config, MidtrainConfig | RLConfig)]
    assert len(set(directories)) == len(training)  # two runs in one directory would train on each other's steps
    # Mid-trainings: 3 of Granite-3.3, 2 of LLaMA and Mistral-7B each, 2 + 2 lengths + 3 budgets of Granite-4 Micro,
    # 1 of each other model, and 2 long-context phases.
    assert sum(stage.verb == "midtrain" for stage in found) == 3 + 2 + 2 + 7 + 3 + 2


def test_an_rl_stage_starts_from_what_its_mid_training_ends_with() -> None:
    stages = {stage.name: stage for stage in pipeline("mistral-small-24b", root="s")}
    mid, rl = stages["mistral-small-24b-mcs"], stages["mistral-small-24b-mcs-rl-mcs"]
    assert isinstance(mid.config, MidtrainConfig)
    assert isinstance(rl.config, RLConfig)
    assert mid.config.init_from == "s/checkpoints/mistral-small-24b"
    assert rl.config.init_from == "s/runs/mistral-small-24b-mcs/checkpoints/step_00025000"
    assert rl.after == (mid.name,)
    assert rl.config.tasks == [f"prompts:s/prompts/unbalanced/{d}.jsonl" for d in ("math", "code", "science")]
    evaluation = stages["mistral-small-24b-mcs-rl-mcs-reasoning"]
    assert evaluation.command(Path("c")) == [
        *("prism-nemo", "eval", "s/runs/mistral-small-24b-mcs-rl-mcs/checkpoints/step_00001000"),
        *("--suite", "reasoning", "--out", "s/evaluations/mistral-small-24b-mcs-rl-mcs-reasoning"),
        *("--seed", "0", "--tp", "4", "--dp", "16"),
    ]


def test_a_merged_model_goes_through_hugging_face_folders() -> None:
    stages = stages_of(Route("granite-3.3-8b", "mc", merge=True, long=True), root="s", suites=())
    assert [stage.verb for stage in stages] == ["import", "midtrain", "export", "merge", "import", "midtrain"]
    assert stages[3].arguments == (
        *("s/hf/granite-3.3-8b", "s/hf/granite-3.3-8b-mc", "--weight", "0.15"),
        *("--out", "s/hf/granite-3.3-8b-mc-merged"),
    )
    long = stages[-1].config
    assert isinstance(long, MidtrainConfig)
    assert long.init_from == "s/checkpoints/granite-3.3-8b-mc-merged"


def test_files_that_are_written_are_the_configurations(tmp_path: Path) -> None:
    found = grid.stages([Route("granite-4.0-micro", "mc", "mc", steps=10_000)], "h100x8", tmp_path, ())
    listed = json.loads(grid.write(found, tmp_path).read_text())
    assert [entry["name"] for entry in listed] == [stage.name for stage in found]
    for stage, entry in zip(found, listed, strict=True):
        if stage.config is not None:
            path = Path(entry["command"][-1])
            assert resolve(type(stage.config), load_yaml(path)) == stage.config
            assert (entry["nodes"], entry["processes"]) == (1, 8)
    assert isinstance(found[1].config, MidtrainConfig)
    assert found[1].config.train_steps == 10_000
    assert found[2].config is not None
    assert "step_00010000" in (tmp_path / "stages" / f"{found[2].name}.yaml").read_text()


def test_dry_run_prints_what_sbatch_would_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grid.main(["submit", "timing", "--root", str(tmp_path), "--hardware", "h100x16", "--dryrun"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sbatch")]
    assert "--dependency" not in lines[0]
    assert "--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --dependency=afterok:granite-4.0-micro-import" in lines[1]
    assert lines[1].endswith(f"midtrain {tmp_path}/stages/granite-4.0-micro-mcs.yaml")


def test_what_is_done_is_not_queued_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`import` refuses a folder that exists: a grid that is submitted again would fail in its first job."""
    found = grid.stages([Route("llama-3.1-8b", "mcs")], "h100x64", tmp_path, ())
    (tmp_path / "checkpoints/llama-3.1-8b").mkdir(parents=True)
    assert list(grid.submit(found, tmp_path, dry=True)) == ["llama-3.1-8b-mcs"]
    assert "--dependency" not in capsys.readouterr().out
    (tmp_path / "runs/llama-3.1-8b-mcs/checkpoints/step_00025000").mkdir(parents=True)
    assert grid.submit(found, tmp_path, dry=True) == {}


def test_a_refusal_of_sbatch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'Invalid account or account/partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = grid.stages([Route("llama-3.1-8b", "mcs")], "h100x64", tmp_path / "s", ())
    with pytest.raises(PrismError, match=r"llama-3.1-8b-import: sbatch refused it: Invalid account"):
        grid.submit(found, tmp_path / "s", dry=False)


@pytest.mark.parametrize(
    ("route", "hardware", "message"),
    [
        (Route("llama-9"), "h100x64", "unknown model 'llama-9'"),
        (Route("llama-3.1-8b", "all"), "h100x64", "mixture 'all' is unknown; choose one of none, math, mc, mcs"),
        (Route("llama-3.1-8b", "mc", "math"), "h100x64", "rl_mixture 'math' is unknown"),
        (Route("llama-3.1-8b", "", long=True), "h100x64", "merge and long follow mid-training"),
        (Route("llama-3.1-8b", "mc"), "h100x7", "hardware 'h100x7' is unknown"),
        (Route("nemotron-h-8b", "mc", long=True), "h100x64", "there is no long context to restore"),
    ],
)
def test_wrong_routes(route: Route, hardware: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stages_of(route, hardware)


def test_two_stages_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = grid.stages([Route("llama-3.1-8b", "mc")], "h100x64", tmp_path, ())
    other = [replace(stage, hardware="h100x32") for stage in first]
    answers = iter([first, other])
    monkeypatch.setattr(grid, "stages_of", lambda *_: next(answers))
    with pytest.raises(PrismError, match=r"two stages are named llama-3\.1-8b-import"):
        grid.stages([Route("llama-3.1-8b", "mc"), Route("llama-3.1-8b", "mc")], "h100x64", tmp_path, ())


def test_unknown_experiments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert grid.main(["list", "tables"]) == 2
    assert "experiment 'tables' is unknown; choose from domains, models" in capsys.readouterr().err
