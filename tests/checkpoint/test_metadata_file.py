"""Metadata of a checkpoint from an unknown source: read, and nothing of it is run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from prism_nemo.checkpoint.distcp_reader import CheckpointReader
from prism_nemo.checkpoint.metadata_file import read_metadata
from prism_nemo.errors import InputError


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_metadata_that_wants_to_run_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(InputError, match="not readable as checkpoint metadata"):
        read_metadata(tmp_path)
    with pytest.raises(InputError, match="not readable as checkpoint metadata"):
        CheckpointReader(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.planner", "operator.attrgetter"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.filesystem", "os"),
        ("torch", "load"),
        ("builtins", "eval"),
    ],
)
def test_metadata_reaches_nothing_through_the_modules_it_may_name(module: str, name: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(InputError, match="which checkpoint metadata has no use for"):
        read_metadata(tmp_path)
