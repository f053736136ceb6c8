"""`prism-nemo models`: what people see, what programs read, and the answer to a wrong name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

import prism_nemo.cli as cli
from prism_nemo.models.catalog import CATALOG, Model
from prism_nemo.models.catalog_view import catalog_notes

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str, columns: int = 100) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["prism-nemo", "models", *args])
        cli.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("columns", [100, 160])
def test_overview_shows_every_model_whole(run: Run, columns: int) -> None:
    out = run(columns=columns)
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in out
    words = out.split()
    for model in CATALOG.values():
        row = next(i for i, line in enumerate(lines) if line.startswith(f"{model.name} "))
        assert lines[row + 1].startswith(f"{model.hub_id} ")
        assert f"{model.parameters / 1e9:.2f}B" in lines[row]
        assert model.architecture.family in lines[row]
        assert f"{model.context_length:,}" in lines[row + 1]
        cell = " ".join(lines[row : row + 2])
        for size in model.pipeline_parallel_sizes:
            assert f" {size} " in f"{cell} "
        for key, sureness in model.unsure_fields.values():
            assert key in words
            assert f"({sureness})" in out
    if columns == 160:
        assert "36 Mamba + 4 attention " in out
        assert "24 Mamba + 4 attention + 24 MLP " in out


def test_overview_is_not_cut_in_a_narrow_terminal(run: Run) -> None:
    assert run(columns=60) == run(columns=100)


@pytest.mark.parametrize("model", CATALOG.values(), ids=CATALOG.keys())
def test_detail_shows_every_value_and_why_it_is_not_sure(run: Run, model: Model) -> None:
    for columns in (100, 160):
        out = run(model.hub_id, columns=columns)
        assert max(map(len, out.splitlines())) <= columns
        assert "…" not in out
        rows = {line.split()[0]: line for line in out.split("config.json", 1)[1].splitlines() if line.strip()}
        for key in model.config | model.unsure:
            sureness = model.unsure[key].sureness if key in model.unsure else "A"
            assert f" {sureness} " in f"{rows[key]} ", key
        assert f"{model.parameters:,}" in out
        assert "DIFFERENT" not in out
        for source in model.sources:
            assert source in out


def test_json_is_strict_and_complete(run: Run) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    models = json.loads(run("--json"), parse_constant=refuse)
    assert [m["name"] for m in models] == list(CATALOG)
    one = json.loads(run("granite-4.0-h-micro", "--json"), parse_constant=refuse)
    assert one == models[2]
    assert one["parameters"] == one["stated_parameters"] == 3_191_396_096
    assert one["tensor_parallel_sizes"] == [1, 2, 4, 8]
    assert one["pipeline_parallel_sizes"] == [1, 2, 4, 5, 8, 10, 16, 20, 40, 80]
    assert one["config"] == CATALOG["granite-4.0-h-micro"].config
    assert one["unsure"]["rms_norm_eps"]["sureness"] == "B"
    assert one["unsure"]["time_step_limit"]["in_config"] is False


def test_an_unknown_model_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prism-nemo", "models", "mistral-24b"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "did you mean mistral-small-24b?" in capsys.readouterr().err


def test_import_says_where_a_checkpoint_and_the_catalog_differ() -> None:
    model = CATALOG["granite-4.0-h-micro"]
    read = replace(model.architecture, logits_scaling=6.0, residual_multiplier=0.25)
    notes = catalog_notes(read)
    assert any("logits_scaling: 6.0 taken from the checkpoint; the catalog has 8" in note for note in notes)
    (warning,) = [note for note in notes if note.startswith("warning")]
    assert "residual_multiplier: 0.25; the catalog is sure of 0.22" in warning
    assert catalog_notes(replace(read, hidden_size=7)) == []
