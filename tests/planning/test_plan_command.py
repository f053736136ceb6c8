"""`prism-nemo plan`: from a recipe without a checkpoint or data to a table, JSON, or a refusal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import prism_nemo.cli as cli
from prism_nemo.models.catalog import CATALOG
from prism_nemo.planning.plan import make_plan

RECIPE = Path(__file__).parents[2] / "recipes" / "midtrain.py"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object, columns: int = 100) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["prism-nemo", "plan", str(RECIPE), *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("model", CATALOG)
@pytest.mark.parametrize("gpu", ["h100", "b200"])
def test_every_model_has_a_plan(run: Run, model: str, gpu: str) -> None:
    code, out, err = run("--model", model, "--gpus", 64, "--gpu", gpu)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert "…" not in out
    assert f"{CATALOG[model].parameters:,} parameters" in out
    assert "26.21B tokens" in out  # the study's 25,000 steps of 128 x 8,192
    assert "not measured on any GPU" in " ".join(out.split())
    assert "TP1 PP1 DP1, is not for 64 GPUs" in out


def test_the_recipes_own_model_is_planned_for(run: Run) -> None:
    """As `midtrain` takes it: the layout is the model's own too. A folder that is given instead still goes first."""
    code, out, err = run("model=llama-3.1-8b", "mixture=mcs", "hardware=h100x64", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["model"], found["gpus"], found["recipe"]["fits"]) == ("llama-3.1-8b", 64, True)
    code, out, _ = run("model=llama-3.1-8b", "hardware=h100x64", "--model", "granite-3.3-8b", "--json")
    assert json.loads(out)["model"] == "granite-3.3-8b"


def test_json_has_everything_and_nothing_else_is_printed(run: Run) -> None:
    code, out, _ = run("--model", "mistral-small-24b", "hardware=h100x64", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["gpus"] == 64
    assert found["recipe"]["layout"] == "TP4 PP2 DP8 SP"
    assert found["recipe"]["fits"] is True
    assert found["refused"] is None
    assert found["tokens"] == 25_000 * 128 * 8192
    best = found["layouts"][0]
    assert best["tokens_per_second"] == pytest.approx(128 * 8192 / best["step_seconds"])
    assert best["days"] == pytest.approx(25_000 * best["step_seconds"] / 86400)
    assert best["gpu_hours"] == pytest.approx(best["days"] * 24 * 64)
    assert best["mfu"] == pytest.approx(found["flops_per_token"] * best["tokens_per_second"] / (64 * 989e12))
    assert 0 < best["mfu"] < found["assumptions"]["gemm_efficiency"]
    memory = best["memory"]
    assert memory["total"] == sum(value for name, value in memory.items() if name not in ("stage", "total"))
    assert all(layout["fits"] or layout["refusal"] for layout in found["layouts"])


def test_a_recipe_that_does_not_fit_is_refused(run: Run) -> None:
    code, out, err = run("--model", "mistral-small-24b", "parallel.data_parallel_size=64")
    assert code == 2
    assert err.startswith(
        "prism-nemo: mistral-small-24b as TP1 PP1 DP64 on 64 x h100: parameters 47.1 + gradients 94.3"
    )
    assert "GB more than h100 has (80 GB); these would fit: TP" in err
    assert "does not fit" in out
    code, _, err = run("--model", "mistral-small-24b", "--gpus", 2)
    assert code == 2
    assert "no layout fits" in err
    code, _, err = run("--model", "llama-3.1-8b", "hardware=h100x64", "parallel.tensor_model_parallel_size=16")
    assert code == 2
    assert "tensor_model_parallel_size 16 does not divide" in err


@pytest.mark.parametrize(
    ("gpus", "advice"),
    [(48, "--gpus 32 or 64 would do"), (24, "--gpus 16 or 32 would do"), (7, "--gpus 4 or 8 would do")],
)
def test_a_number_of_gpus_without_any_layout_is_refused(run: Run, gpus: int, advice: str) -> None:
    """128 rows of a step, 8 groups of heads and 32 layers cannot be shared by 3 or by 7."""
    code, out, err = run("--model", "llama-3.1-8b", "--gpus", gpus, "--json")
    assert code == 2
    assert err.startswith(f"prism-nemo: llama-3.1-8b on {gpus} x h100: no layout is possible, most often because ")
    assert advice in err
    found = json.loads(out)
    assert found["refused"] in err
    assert all(layout["memory"] is None for layout in found["layouts"])


def test_precision_recomputation_and_layout_come_from_the_recipe(run: Run) -> None:
    arguments = ["--model", "mistral-small-24b", "hardware=h100x64", "--json"]
    before = json.loads(run(*arguments)[1])
    fp8 = ["precision.fp8=on", "precision.fp8_recipe=blockwise", "recompute.granularity=full"]
    layout = ["parallel.virtual_pipeline_model_parallel_size=4", "parallel.context_parallel_size=2"]
    code, out, _ = run(*arguments, *fp8, *layout, "parallel.data_parallel_size=4")
    after = json.loads(out)
    assert code == 0
    assert (before["fp8_recipe"], after["fp8_recipe"]) == (None, "blockwise")
    assert after["recipe"]["layout"] == "TP4 PP2 VPP4 CP2 DP4 SP"
    assert (before["recipe"]["recompute"], after["recipe"]["recompute"]) == ("none", "full")
    assert after["recipe"]["time"]["context_parallel"] > 0
    assert after["recipe"]["memory"]["fp8_weights"] > 0
    assert after["recipe"]["memory"]["activations"] < before["recipe"]["memory"]["activations"] / 4
    code, out, _ = run("--model", "mistral-small-24b", "hardware=h100x64", *fp8)
    assert "linear layers in FP8 (blockwise)" in out
    assert max(map(len, out.splitlines())) <= 100


def test_assumptions_change_the_plan(run: Run) -> None:
    arguments = ("--model", "llama-3.1-8b", "hardware=h100x8", "--json")
    before = json.loads(run(*arguments)[1])["recipe"]
    after = json.loads(run(*arguments, "--assume", "gemm_efficiency=0.325", "--assume", "reserved_bytes=0")[1])[
        "recipe"
    ]
    assert after["time"]["gemm"] == pytest.approx(2 * before["time"]["gemm"])
    assert before["memory"]["total"] - after["memory"]["total"] == 4_000_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which model? give --model NAME"),
        (["--model", "llama-8b"], "unknown model 'llama-8b'; did you mean llama-3.1-8b?"),
        (["--model", "llama-3.1-8b", "--gpu", "v100"], "--gpu 'v100' is unknown"),
        (["--model", "llama-3.1-8b", "--assume", "speed=2"], "override 'speed=2': unknown key 'speed'"),
        (["--model", "llama-3.1-8b", "lrr=3"], "unknown key 'lrr'"),
        (["--model", "llama-3.1-8b", "global_batch_size=0"], "global_batch_size: 0 must be at least 1"),
        (["--model", "nemotron-h-8b", "seq_length=16384"], "seq_length 16384 is more than the model's 8192"),
        (["--model", "llama-3.1-8b", "--gpu", "a100", "precision.fp8=on"], "capability 8.0, which has no FP8"),
        (["--model", "llama-3.1-8b", "precision.fp8=on", "precision.fp8_recipe=mxfp8"], "mxfp8 needs a Blackwell GPU"),
        (["--model", "nemotron-h-8b", "precision.fp8=on"], "on is not available for hybrids"),
        (["--model", "llama-3.1-8b", "precision.fp8=on", "precision.fp8_recipe=none"], "fp8_recipe: 'none' is unknown"),
        (["--model", "llama-3.1-8b", "precision.fp8_recipe=mxfp8"], "mxfp8 has no effect with precision.fp8=off"),
        (["--model", "llama-3.1-8b", "precision.fp8=emulate"], "emulate measures what a recipe does to the loss"),
        (["--model", "llama-3.1-8b", "precision.dtype=fp32"], "fp32 on GPUs is not planned for"),
        (["--model", "llama-3.1-8b", "precision.fp8_param_gather=true"], "fp8_param_gather needs precision.fp8=on"),
        (["--model", "llama-3.1-8b", "recompute.granularity=full", "recompute.num_layers=2"], "are predicted of none"),
        (["checkpoint=/no/such/checkpoint"], "/no/such/checkpoint: not a complete"),
        (["--model", "llama-3.1-8b", "--gpus", "0"], "--gpus"),
    ],
)
def test_wrong_input_ends_with_2(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_model_of_the_recipe_needs_no_name(tmp_path: Path) -> None:
    config: dict[str, Any] = {**CATALOG["llama-3.1-8b"].config}
    (tmp_path / "recipe.yaml").write_text(
        json.dumps(
            {"run_dir": "r", "data": {"path": "d"}, "model": config, "parallel": {"tensor_model_parallel_size": 8}}
        )
    )
    plan = make_plan(tmp_path / "recipe.yaml", [])
    assert plan.parameters == CATALOG["llama-3.1-8b"].parameters
    assert plan.own is not None
    assert plan.own.layout.tensor_model_parallel_size == 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert make_plan(RECIPE, [], model=str(tmp_path)).architecture == plan.architecture


def test_a_rehearsal_leaves_this_process_as_it_was(run: Run) -> None:
    import prism_nemo.runtime.cpu as cpu

    adapted = cpu._adapted
    code, out, _ = run("--model", "granite-4.0-h-micro", "hardware=h100x8", "--rehearse")
    assert code == 0
    assert "8 ranks built in" in out
    words = " ".join(out.split())
    assert f"parameters of all ranks {CATALOG['granite-4.0-h-micro'].parameters:,}, equal to the model's" in words
    assert max(map(len, out.splitlines())) <= 100
    assert not dist.is_initialized()
    assert cpu._adapted is adapted
