"""The models and workers of tests/training serve here too; their folder is put on the path. And a policy to train."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_training import character_tokenizer, write_llama

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import ParallelConfig


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random model with a vocabulary of 101 for 100 characters, and its tokenizer."""
    root = tmp_path_factory.mktemp("policy")
    character_tokenizer(root / "tokenizer")
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    import_hf(write_llama(root / "hf", seed=3, std=0.1, **sizes), root / "native", ParallelConfig())
    return {"init_from": str(root / "native"), "tokenizer": str(root / "tokenizer")}
