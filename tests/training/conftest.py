"""Data, a starting checkpoint, and runs that several tests read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_training import LAYOUTS, build_data, midtrain_config, write_llama

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import ParallelConfig
from prism_nemo.runtime.launch import launch
from prism_nemo.training.midtrain import midtrain


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, grouped queries, vocabulary 255."""
    return write_llama(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="session")
def initial(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a native checkpoint."""
    path = tmp_path_factory.mktemp("initial") / "checkpoint"
    import_hf(hf_model, path, ParallelConfig())
    return path


@pytest.fixture(scope="session")
def run_of(data: Path, initial: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run directory of ten undisturbed steps at a layout and micro-batch size; each is run once."""
    root, done = tmp_path_factory.mktemp("runs"), {}

    def run(layout: str, micro_batch_size: int = 2) -> Path:
        key = f"{layout} {micro_batch_size}"
        if key not in done:
            config = midtrain_config(
                root / key, data, initial, parallel=LAYOUTS[layout], micro_batch_size=micro_batch_size
            )
            launch(midtrain, config, key, processes=config.parallel.world_size)
            done[key] = Path(config.run_dir)
        return done[key]

    return run
