"""A stage as something that can be started: its configuration, its command, and what has to be done before it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prism_nemo.config import MidtrainConfig, RLConfig, to_yaml
from prism_nemo.evaluation.settings import EvaluateConfig
from recipes.provenance import Values

StageConfig = MidtrainConfig | RLConfig | EvaluateConfig


@dataclass(frozen=True)
class Stage:
    """One command of a chain.

    Attributes:
        name: Unique in the chain; also of its files.
        verb: Of ``prism-nemo``.
        hardware: Name in `recipes.hardware`.
        after: Names of the stages that must have succeeded.
        config: Of a stage that trains or evaluates.
        values: Where its values came from.
        arguments: Of every other verb.
    """

    name: str
    verb: str
    hardware: str
    after: tuple[str, ...] = ()
    config: StageConfig | None = None
    values: Values | None = None
    arguments: tuple[str, ...] = ()

    def command(self, folder: Path) -> list[str]:
        """What starts it; training stages read the file that `write` leaves in `folder`."""
        if isinstance(self.config, EvaluateConfig):
            return ["prism-nemo", self.verb, *evaluation_arguments(self.config)]
        if self.config is not None:
            return ["prism-nemo", self.verb, str(self.config_path(folder))]
        return ["prism-nemo", self.verb, *self.arguments]

    def config_path(self, folder: Path) -> Path:
        """Where its configuration is kept."""
        return folder / f"{self.name}.yaml"

    def write(self, folder: Path) -> None:
        """Keep the resolved configuration, which is the record of what was asked for."""
        if self.config is not None and not isinstance(self.config, EvaluateConfig):
            folder.mkdir(parents=True, exist_ok=True)
            self.config_path(folder).write_text(to_yaml(self.config))

    @property
    def output(self) -> Path | None:
        """What is there once the stage is done; None for an evaluation, which finds out itself and goes on."""
        if isinstance(self.config, EvaluateConfig):
            return None
        if self.config is not None:
            return Path(last_checkpoint(self.config))
        return Path(self.arguments[self.arguments.index("--out") + 1])

    @property
    def done(self) -> bool:
        """Whether its output is there."""
        return self.output is not None and self.output.exists()

    @property
    def processes(self) -> int:
        """That its layout needs; 1 for work on files."""
        return self.config.parallel.world_size if self.config is not None else 1


def evaluation_arguments(config: EvaluateConfig) -> list[str]:
    """Command-line form of an evaluation: what a recipe can set."""
    found = [config.model, "--suite", config.suite, "--out", config.out, "--seed", str(config.seed)]
    found += ["--tp", str(config.parallel.tensor_model_parallel_size)]
    return [*found, "--dp", str(config.parallel.data_parallel_size)]


def last_checkpoint(config: MidtrainConfig | RLConfig) -> str:
    """The checkpoint that a training stage ends with."""
    return str(Path(config.run_dir) / "checkpoints" / f"step_{config.train_steps:08d}")
