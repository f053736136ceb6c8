"""Where numbers go beside metrics.jsonl."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_training import midtrain_config
from training_workers import midtrain_interrupted

from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.config import MonitorConfig
from prism_nemo.data.manifest import load_manifest
from prism_nemo.data.plan import make_plan
from prism_nemo.data.samples import Samples
from prism_nemo.errors import InputError, StoppedEarly
from prism_nemo.planning.flops import training_flops
from prism_nemo.run import read_metrics
from prism_nemo.runtime.launch import launch
from prism_nemo.training import monitors
from prism_nemo.training.midtrain import midtrain
from prism_nemo.training.monitors import Monitors, check_monitors
from prism_nemo.training.utilisation import bf16_peak


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_line_once_although_the_run_was_stopped(
    data: Path, initial: Path, tmp_path: Path
) -> None:
    config = midtrain_config(tmp_path / "run", data, initial)
    with pytest.raises(StoppedEarly):
        launch(midtrain_interrupted, config, 5, "stop")
    launch(midtrain, config)
    scalars = _scalars(tmp_path / "run" / "tensorboard")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    for name in ("loss", "grad_norm", "lr", "tokens", "loss/letters", "tflops", "memory_gb"):
        assert scalars[name] == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    assert [step for step, _ in scalars["validation_loss"]] == [5, 10]


def test_flops_are_those_of_the_documents_that_were_read(data: Path, initial: Path, tmp_path: Path) -> None:
    config = midtrain_config(tmp_path / "run", data, initial, train_steps=3)
    launch(midtrain, config)
    samples = Samples(
        load_manifest(data), make_plan(load_manifest(data), seq_length=32, seed=1234, packing="best_fit"), tmp_path
    )
    samples.prepare(0, 24)
    before = 0
    for step, line in enumerate(line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in line):
        lengths = samples.rows(step * 8, 8)["cu_seqlens"].diff().tolist()
        seconds = (line["tokens"] - before) / line["tokens_per_second"]
        before = line["tokens"]
        flops = training_flops(read_architecture(initial), lengths)
        assert line["tflops"] * 1e12 * seconds == pytest.approx(flops, rel=1e-6)


class _Stand:
    """Stands in for a service: remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.told.append((name, args, kwargs))
            return self

        return call


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, _Stand]:
    """`wandb` and `mlflow` as far as they are used, by their documentation."""
    wandb, mlflow = _Stand(), _Stand()
    for name, stand in (("wandb", wandb), ("mlflow", mlflow)):
        module = types.ModuleType(name)
        module.__getattr__ = lambda attribute, stand=stand: getattr(stand, attribute)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["wandb"].util = types.SimpleNamespace(generate_id=lambda: "abc123")  # type: ignore[attr-defined]
    sys.modules["wandb"].init = lambda **given: wandb.init(**given)  # type: ignore[attr-defined]
    mlflow.__dict__["info"] = types.SimpleNamespace(run_id="m1")
    monkeypatch.setattr(monitors, "_installed", lambda package: True)
    return {"wandb": wandb, "mlflow": mlflow}


LINE = {"step": 7, "loss": 2.5, "reward_by_task": {"lists": 0.5}, "note": "text", "flag": True}
EXPECTED = {"loss": 2.5, "reward_by_task/lists": 0.5}


def test_wandb_and_mlflow_get_numbers_by_step_and_know_a_resumed_run(
    services: dict[str, _Stand], tmp_path: Path
) -> None:
    config = MonitorConfig(tensorboard=False, wandb="offline", mlflow_uri=str(tmp_path / "mlruns"))
    for first_step in (0, 6):
        found = Monitors(config, tmp_path, {"optimizer.lr": 1e-3}, first_step)
        found.log(LINE)
        found.close()
    wandb, mlflow = services["wandb"].told, services["mlflow"].told
    starts = [given for name, _, given in wandb if name == "init"]
    assert [given["id"] for given in starts] == ["abc123", "abc123"]
    assert {(given["mode"], given["resume"], given["dir"]) for given in starts} == {("offline", "allow", str(tmp_path))}
    assert starts[0]["config"] == {"optimizer.lr": 1e-3}
    assert ("log", (EXPECTED,), {"step": 7}) in wandb
    assert ("log_metrics", (EXPECTED,), {"step": 7}) in mlflow
    assert [given["run_id"] for name, _, given in mlflow if name == "start_run"] == [None, "m1"]
    assert [name for name, _, _ in mlflow].count("log_params") == 1
    assert [name for name, _, _ in mlflow].count("end_run") == 2


def test_a_monitor_that_fails_is_left_out_and_the_others_go_on(
    services: dict[str, _Stand], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MonitorConfig(tensorboard=False, wandb="online", mlflow_uri="http://nowhere")
    found = Monitors(config, tmp_path, {}, 0)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    services["wandb"].__dict__["log"] = refuse
    for _ in range(3):
        found.log(LINE)
    found.close()
    assert capsys.readouterr().err.count("W&B failed and is left out from here on (ConnectionError: no route") == 1
    assert [name for name, _, _ in services["mlflow"].told].count("log_metrics") == 3


def test_what_is_asked_for_by_name_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "_installed", lambda package: False)
    check_monitors(MonitorConfig())
    for config, package in (
        (MonitorConfig(tensorboard=True), "tensorboard"),
        (MonitorConfig(wandb="offline"), "wandb"),
        (MonitorConfig(mlflow_uri="x"), "mlflow"),
    ):
        with pytest.raises(InputError, match=f"{package} is asked for but not installed"):
            check_monitors(config)
    with pytest.raises(InputError, match=r"monitor\.wandb: 'on' is unknown; known: off, online, offline"):
        check_monitors(MonitorConfig(wandb="on"))


def test_peaks_of_cards_by_the_names_that_drivers_give() -> None:
    assert bf16_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert bf16_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert bf16_peak("NVIDIA B200") == 2250e12
    assert bf16_peak("NVIDIA GeForce RTX 4090") is None


def test_metrics_stay_plain_json(data: Path, initial: Path, tmp_path: Path) -> None:
    launch(midtrain, midtrain_config(tmp_path / "run", data, initial, train_steps=1))
    for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
