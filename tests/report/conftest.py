"""The fixture of the report tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_run import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Gives a function that writes a quickstart directory and returns it."""
    return lambda content=None: write_run(tmp_path / "run", content)
