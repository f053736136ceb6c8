"""Tiny models shared by the tests of this folder; made once, never edited in place."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llama import save_tiny_llama


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped-query attention, untied, vocabulary of 304."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tied_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings and a vocabulary (301) that needs padding at any even tensor-parallel size."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tied", vocab_size=301, tie_word_embeddings=True)
