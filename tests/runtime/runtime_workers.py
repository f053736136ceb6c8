"""What the tests of prism_nemo.runtime run in processes of their own; module-level, so that they can be pickled."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.config import OptimizerConfig, ParallelConfig
from prism_nemo.errors import StoppedEarly
from prism_nemo.models.family import Architecture
from prism_nemo.runtime import start, stop
from prism_nemo.training.stopping import StopRequest


def rank_and_argument(argument: Any) -> tuple[int, int, Any]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), argument


def sum_of_ranks() -> float:
    start(ParallelConfig(data_parallel_size=2), seed=0)
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    stop()
    return total.item()


def raise_error(error: BaseException) -> None:
    raise error


def divide_by_zero_on(rank: int) -> int:
    """The other ranks wait in a collective that will never complete."""
    start(ParallelConfig(data_parallel_size=2), seed=0)
    if dist.get_rank() == rank:
        return 1 // 0
    dist.barrier()
    return 0


def earliest_cause(folder: str, error: Exception, consequence: Exception) -> None:
    """Rank 1 fails first; rank 0 fails because of it and says something less useful."""
    seen = Path(folder, "rank 1 has failed")
    if os.environ["RANK"] == "1":
        try:
            raise error
        finally:
            seen.touch()
    while not seen.exists():
        time.sleep(0.001)
    time.sleep(0.02)
    raise consequence


def die_on(rank: int, how: str) -> None:
    start(ParallelConfig(data_parallel_size=2), seed=0)
    if dist.get_rank() == rank:
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def start_with(parallel: ParallelConfig) -> dict[str, Any]:
    from megatron.core import parallel_state

    runtime = start(parallel, seed=5)
    found = {
        "device": str(runtime.device),
        "dtype": runtime.dtype,
        "rank": runtime.rank,
        "world_size": runtime.world_size,
        "is_main": runtime.is_main,
        "backend": dist.get_backend(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
        "drawn": torch.rand(2),
    }
    stop()
    found["groups_after_stop"] = dist.is_initialized()
    return found


def start_twice() -> list[torch.Tensor]:
    """A process that starts again (a second stage) draws the same numbers."""
    drawn = []
    for _ in range(2):
        start(ParallelConfig(), seed=5)
        drawn.append(torch.rand(3))
        stop()
    return drawn


def sleep_long(marker: str) -> None:
    Path(marker).write_text(str(os.getpid()))
    time.sleep(120)


def work_in_steps(marker: str, seconds: float, last: bool = False) -> str:
    """Steps that take so long and are finished after a signal, then a save: what a stage does.

    With `last` the step in which the signal comes is the last one: the work is done, there is nothing to stop.
    """
    with StopRequest(None, torch.device("cpu")) as request:
        Path(marker).write_text(str(os.getpid()))
        while request.reason is None:
            time.sleep(seconds)
            sys.stderr.write("a step is done\n")  # an error where the terminal is gone
            sys.stderr.flush()
        if not last:
            Path(marker).with_name("saved").write_text(request.reason)
            raise StoppedEarly(f"saved after {request.reason}")
    return f"done in spite of {request.reason}"


def adapted_modules() -> dict[str, list[Any]]:
    """For each adapted module: whether its `torch` was torch's before, is another after, and stays the same again."""
    from prism_nemo.runtime import cpu

    modules = {name: importlib.import_module(name) for name in cpu.ADAPTED_MODULES}
    before = {name: module.torch is torch for name, module in modules.items()}
    cpu.adapt()
    first = {name: module.torch for name, module in modules.items()}
    cpu.adapt()
    return {
        name: [before[name], first[name] is not torch, module.torch is first[name]] for name, module in modules.items()
    }


def _raises(function: Any, *args: Any, **kwargs: Any) -> bool:
    try:
        function(*args, **kwargs)
    except (AssertionError, RuntimeError):
        return True
    return False


TINY = Architecture(
    family="llama",
    vocab_size=16,
    hidden_size=8,
    ffn_hidden_size=8,
    num_layers=1,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=4,
    norm_epsilon=1e-5,
    tied_embeddings=False,
    max_position_embeddings=8,
)


def torch_after_adapt() -> dict[str, bool]:
    from prism_nemo.training.trainer import Trainer

    names = ["tensor", "zeros", "ones", "empty", "full", "arange", "rand", "empty_like", "zeros_like", "ones_like"]
    cuda_names = ["current_device", "synchronize", "empty_cache", "manual_seed", "get_rng_state", "set_rng_state"]
    before = {name: getattr(torch, name) for name in names}
    before_cuda = {name: getattr(torch.cuda, name) for name in cuda_names}
    runtime = start(ParallelConfig(), seed=0)
    for distributed in (True, False):  # building an optimizer is where type() has to lie for a moment
        Trainer(TINY, runtime, OptimizerConfig(), 8, use_distributed_optimizer=distributed)
    found = {
        "zeros on cuda raises": _raises(torch.zeros, 1, device="cuda"),
        "tensor on cuda raises": _raises(torch.tensor, 1.0, device="cuda"),
        "current_device raises": _raises(torch.cuda.current_device),
        "synchronize raises": _raises(torch.cuda.synchronize),
        "type() tells the truth": torch.zeros(1).type() == "torch.FloatTensor",
        "cuda is not available": not torch.cuda.is_available(),
        **{f"torch.{name}": getattr(torch, name) is value for name, value in before.items()},
        **{f"torch.cuda.{name}": getattr(torch.cuda, name) is value for name, value in before_cuda.items()},
    }
    stop()
    return found


def stand_in_answers() -> dict[str, Any]:
    """What Megatron's modules see under the name torch."""
    from megatron.core.tensor_parallel import layers

    start(ParallelConfig(), seed=0)
    fake: Any = layers.torch
    torch.manual_seed(3)
    state = fake.cuda.get_rng_state()
    drawn = torch.rand(2)
    fake.cuda.set_rng_state(state)
    found = {
        "current_device": str(fake.cuda.current_device()),
        "literal": str(fake.zeros(2, device="cuda").device),
        "indexed": str(fake.empty(2, device="cuda:1").device),
        "pinned": fake.ones(1, pin_memory=True).is_pinned(),
        "values": fake.tensor([1, 2], device="cuda", dtype=torch.int32).tolist(),
        "passes through": fake.nn is torch.nn and fake.float32 is torch.float32,
        "rng": torch.equal(torch.rand(2), drawn),
    }
    fake.cuda.synchronize()
    fake.cuda.empty_cache()
    stop()
    return found


def refuses_with_cuda() -> str:
    from prism_nemo.runtime import cpu

    torch.cuda.is_available = lambda: True  # type: ignore[assignment]
    try:
        cpu.adapt()
    except RuntimeError as error:
        return str(error)
    return "adapted"
