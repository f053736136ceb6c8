"""Gathered weights are the exported ones, bit for bit: an export has no ranks to put together, so it cannot share a
mistake in that."""

from __future__ import annotations

import gathered_workers as workers
import pytest
import torch
from tiny_models import save_tiny

from prism_nemo.config import ParallelConfig
from prism_nemo.runtime.launch import launch

# Tied and untied with an odd vocabulary, separate and joined gate and up, two Megatron layers to one, B and C of one
# group, which are parameters of their own at TP 2.
CASES = ("llama-tied", "granite", "granite-hybrid-one-group", "nemotron-h")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Checkpoint and export of each case."""
    root = tmp_path_factory.mktemp("gathered")
    for case in CASES:
        save_tiny(case, root / case / "hf")
    launch(workers.convert_both_ways, [str(root / case) for case in CASES])
    return [(str(root / case / "checkpoint"), str(root / case / "export")) for case in CASES]


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [
        (ParallelConfig(2, 1), torch.float32),
        (ParallelConfig(2, 2), torch.float32),
        # With a mixer's A_log, D and dt_bias in fp32: the other stage must make room of the right type.
        (ParallelConfig(1, 2), torch.bfloat16),
    ],
    ids=lambda value: value.describe() if isinstance(value, ParallelConfig) else str(value),
)
def test_every_rank_gets_the_exported_tensors(
    parallel: ParallelConfig, dtype: torch.dtype, folders: list[tuple[str, str]]
) -> None:
    everyone = launch(workers.against_exports, folders, parallel, dtype, processes=parallel.world_size)
    assert len(everyone) == parallel.world_size
    for rank, found in enumerate(everyone):
        for case, (names, different, most, twice) in zip(CASES, found, strict=True):
            assert (names, different, twice) == ([], [], 0), (rank, case)
            # One parameter's tensors, three at most (query, key, value), and the first of the next.
            assert most <= 4, (rank, case)
