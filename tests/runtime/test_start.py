from __future__ import annotations

import subprocess
import sys

import pytest
import runtime_workers as workers
import torch

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.runtime import start
from prism_nemo.runtime.cpu import ADAPTED_MODULES
from prism_nemo.runtime.launch import launch


def test_start_lays_out_the_groups_and_stop_leaves_them() -> None:
    found = launch(workers.start_with, ParallelConfig(2, 1, 1), processes=2)
    assert {k: found[k] for k in ("tp", "pp", "dp", "rank", "world_size")} == {
        "tp": 2, "pp": 1, "dp": 1, "rank": 0, "world_size": 2
    }  # fmt: skip
    assert (found["device"], found["dtype"], found["backend"]) == ("cpu", torch.float32, "gloo")
    assert found["is_main"] is True
    assert found["groups_after_stop"] is False


def test_seed_decides_what_is_drawn() -> None:
    first, second = launch(workers.start_twice)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("parallel", "processes"), [(ParallelConfig(2, 1, 1), 1), (ParallelConfig(), 2)], ids=["too few", "too many"]
)
def test_layout_that_is_not_the_number_of_processes_is_refused(parallel: ParallelConfig, processes: int) -> None:
    message = f"layout {parallel.describe()} needs {parallel.world_size} processes, but {processes} were started"
    with pytest.raises(InputError, match=message):
        launch(workers.start_with, parallel, processes=processes)


def test_layout_is_refused_before_anything_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="needs 4 processes, but 1 were started"):
        start(ParallelConfig(2, 2), seed=0)
    assert not torch.distributed.is_initialized()


# The CPU adaptation.


def test_every_adapted_module_is_rebound_once() -> None:
    found = launch(workers.adapted_modules)
    assert found.keys() == ADAPTED_MODULES.keys()
    assert found == {name: [True, True, True] for name in ADAPTED_MODULES}


def test_torch_itself_is_left_alone() -> None:
    found = launch(workers.torch_after_adapt)
    assert [what for what, holds in found.items() if not holds] == []


def test_stand_in_reads_cuda_as_cpu() -> None:
    assert launch(workers.stand_in_answers) == {
        "current_device": "cpu",
        "literal": "cpu",
        "indexed": "cpu",
        "pinned": False,
        "values": [1, 2],
        "passes through": True,
        "rng": True,
    }


def test_adaptation_is_refused_where_a_cuda_device_is_present() -> None:
    assert "must not be applied where a CUDA device is present" in launch(workers.refuses_with_cuda)


IMPORTS_ONLY = """
import sys, torch
cuda, tensor_cuda = torch.cuda.current_device, torch.Tensor.cuda
import prism_nemo.runtime, prism_nemo.runtime.cpu, prism_nemo.runtime.launch, prism_nemo.cli
assert not [m for m in sys.modules if m.startswith("megatron")], "importing the runtime imports megatron"
import prism_nemo.runtime.preload
from prism_nemo.runtime.cpu import ADAPTED_MODULES
rebound = [m for m in ADAPTED_MODULES if m in sys.modules and sys.modules[m].torch is not torch]
assert not rebound, rebound
assert len([m for m in ADAPTED_MODULES if m in sys.modules]) > 10, "nothing was imported to look at"
assert torch.cuda.current_device is cuda and torch.Tensor.cuda is tensor_cuda
"""


def test_importing_adapts_nothing() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORTS_ONLY], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
