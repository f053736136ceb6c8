"""Where numbers go beside ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow. None of them can stop a run."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from prism_nemo.config import MonitorConfig
from prism_nemo.errors import InputError
from prism_nemo.run import RunDirectory

WANDB_MODES = ("off", "online", "offline")


class Monitor(Protocol):
    """Somewhere that numbers are sent to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def close(self) -> None:
        """Nothing more comes."""


def check_monitors(config: MonitorConfig) -> None:
    """Refuse what was asked for by name and is not there.

    Raises:
        InputError: Naming the key and the package.
    """
    if config.wandb not in WANDB_MODES:
        raise InputError(f"monitor.wandb: {config.wandb!r} is unknown; known: {', '.join(WANDB_MODES)}")
    asked = {
        "tensorboard": config.tensorboard is True,
        "wandb": config.wandb != "off",
        "mlflow": config.mlflow_uri is not None,
    }
    for package, wanted in asked.items():
        if wanted and not _installed(package):
            raise InputError(f"monitor: {package} is asked for but not installed: pip install {package}")


class Monitors:
    """All monitors of a run; one that fails is told about once and left alone from then on.

    Args:
        config: Which.
        run_dir: TensorBoard and the offline files of W&B go there.
        values: The resolved configuration, for those who show it.
        first_step: The run goes on after this step; later ones of an earlier attempt are replaced.
    """

    def __init__(self, config: MonitorConfig, run_dir: Path, values: Mapping[str, Any], first_step: int) -> None:
        self._monitors: dict[str, Monitor] = {}
        makers: dict[str, Any] = {}
        if config.tensorboard is not False and _installed("tensorboard"):
            makers["TensorBoard"] = lambda: _TensorBoard(run_dir / "tensorboard", first_step)
        if config.wandb != "off":
            makers["W&B"] = lambda: _WandB(config, run_dir, values)
        if config.mlflow_uri is not None:
            makers["MLflow"] = lambda: _MLflow(config, run_dir, values)
        for name, make in makers.items():
            try:
                self._monitors[name] = make()
            except Exception as error:
                _complain(name, error)

    def log(self, values: Mapping[str, Any]) -> None:
        """Sends the numbers among the values of one line; ``step`` says which step."""
        step, numbers = int(values["step"]), _numbers(values)
        for name, monitor in list(self._monitors.items()):
            try:
                monitor.log(step, numbers)
            except Exception as error:
                _complain(name, error)
                del self._monitors[name]

    def close(self) -> None:
        """Writes out what is waiting."""
        for name, monitor in self._monitors.items():
            try:
                monitor.close()
            except Exception as error:
                _complain(name, error)
        self._monitors = {}


def listen(run: RunDirectory, config: Any, monitor: MonitorConfig, first_step: int) -> Monitors:
    """The monitors of a run, told about every line of its log. Only the process that writes has any."""
    quiet = MonitorConfig(tensorboard=False)
    values = OmegaConf.to_container(OmegaConf.structured(config)) if run.writes else {}
    flat = _flat(values) if isinstance(values, dict) else {}
    monitors = Monitors(monitor if run.writes else quiet, run.path, flat, first_step)
    run.listeners.append(monitors.log)
    return monitors


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by path, ``reward_by_task/lists``; everything else is for people."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found[prefix + name] = value
    return found


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _complain(name: str, error: Exception) -> None:
    sys.stderr.write(f"prism-nemo: {name} failed and is left out from here on ({type(error).__name__}: {error})\n")


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: MonitorConfig, run_dir: Path, values: Mapping[str, Any]) -> None:
        import wandb

        identity = _identity(run_dir / "wandb_id.json", wandb.util.generate_id)
        self._run = wandb.init(
            project=config.project,
            name=run_dir.name,
            id=identity,
            resume="allow",
            mode=config.wandb,
            dir=str(run_dir),
            config=dict(values),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, config: MonitorConfig, run_dir: Path, values: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_tracking_uri(config.mlflow_uri)
        mlflow.set_experiment(config.project)
        known = run_dir / "mlflow_id.json"
        identity = json.loads(known.read_text()) if known.is_file() else None
        run = mlflow.start_run(run_id=identity, run_name=None if identity else run_dir.name)
        if identity is None:
            known.write_text(json.dumps(run.info.run_id))
            # MLflow refuses values above some length; the whole configuration is in config.yaml.
            mlflow.log_params({name: str(value)[:250] for name, value in values.items()})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _identity(file: Path, make: Any) -> str:
    """An id that a resumed run finds again, so that its curve goes on."""
    if not file.is_file():
        file.write_text(json.dumps(make()))
    return str(json.loads(file.read_text()))
