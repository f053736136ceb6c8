"""Everything Megatron-Core needs to run without CUDA, in this one file.

Megatron-Core 0.16.1 names CUDA directly in places that have nothing to do with a GPU: ``device="cuda"`` literals,
``torch.cuda.current_device()``, ``torch.cuda.synchronize()``. Nothing is forked and ``torch`` itself is left alone:
each Megatron module listed in ``ADAPTED_MODULES`` sees, under its own global name ``torch``, a stand-in that answers
those names for the CPU and passes everything else through. A handful of functions need more than that; they follow.

``adapt()`` is called by `prism_nemo.runtime.start` only where there is no CUDA device, never at import time, and is
idempotent. Every adaptation names the upstream file and line that makes it necessary (paths under ``megatron/core``).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import queue
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")

# Modules whose global `torch` is replaced, with the lines that would raise "Torch not compiled with CUDA enabled".
ADAPTED_MODULES: dict[str, str] = {
    "megatron.core.tensor_parallel.random": "235-240, 422: cuda RNG states seed and fork the default generator",
    "megatron.core.tensor_parallel.layers": "261, 552, 597, 607, 873, 899: buffers on current_device()",
    "megatron.core.tensor_parallel.mappings": "91, 141, 148, 181: gather/scatter buffers on current_device()",
    "megatron.core.tensor_parallel.utils": "70, 91: gather buffer on current_device()",
    "megatron.core.models.common.embeddings.rotary_pos_embedding": "162: moves inv_freq to current_device()",
    "megatron.core.pipeline_parallel.schedules": "596, 983, 2138: total_num_tokens on 'cuda'",
    "megatron.core.pipeline_parallel.p2p_communication": "190-202, 313, 321, 398: receive buffers, synchronize()",
    "megatron.core.distributed.param_and_grad_buffer": "783, 800, 806: parameter and gradient buffers",
    "megatron.core.optimizer.clip_grads": "90, 103, 115, 174, 207: norm and overflow buffers on 'cuda'",
    "megatron.core.optimizer.optimizer": "473, 481, 485, 907: loss-scale buffers on 'cuda'",
    "megatron.core.optimizer.distrib_optimizer": "791, 1077: optimizer-state buffers on current_device()",
    "megatron.core.utils": "631 (GlobalMemoryBuffer), 1207 (local_multi_tensor_l2_norm)",
    "megatron.core.dist_checkpointing.strategies.filesystem_async": "230: synchronize() before writing",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": "204, 252: flag tensors on the device",
}

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "empty_like", "zeros_like", "ones_like")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory, with ``device="cuda"`` read as the CPU and without pinned memory (which needs CUDA)."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


class _CpuDevice(types.ModuleType):
    """Stands for ``torch.cuda``: the current device is the CPU and its generator is the CPU's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return _CPU

    @staticmethod
    def synchronize(*_: Any, **__: Any) -> None:
        """Nothing runs asynchronously on the CPU."""

    @staticmethod
    def empty_cache() -> None:
        """There is no caching allocator to empty."""

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)


class _CpuTorch(types.ModuleType):
    """Stands for ``torch`` inside one Megatron module; everything not overridden is torch's own."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuDevice("torch.cuda")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """While open, ``tensor.type()`` says 'torch.cuda.FloatTensor' for a CPU tensor.

    optimizer.py:671-699 and distrib_optimizer.py:361-435, 582 choose a parameter's optimizer group by comparing that
    string; a CPU parameter matches none of them and raises "Wrapped parameters must be one of ...".
    """
    original = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # Inside `with torch.device(...)` torch asks twice, the second time with the answer of the first.
        if not isinstance(result, str) or result.startswith("torch.cuda."):
            return result
        return f"torch.cuda.{result.rpartition('.')[2]}"

    torch.Tensor.type = named  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _adapt_rng() -> None:
    """tensor_parallel/random.py:41-108: the "CUDA" generator that Megatron saves, forks and restores is the CPU's."""
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    # random.py:263 warns whenever the CPU generator moved inside fork(), which here is the purpose of fork().
    logging.getLogger(mcore_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())
    # random.py:640 tests `fp8 is not None` with a default of False: without Transformer Engine, recomputing a norm
    # ends in NameError: FP8GlobalStateManager.
    mcore_random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def _adapt_optimizers() -> None:
    """Optimizers built on torch.optim.AdamW, and gradient clipping of CPU tensors."""
    from megatron.core import optimizer as mcore_optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base_optimizer

    class TorchDistributedOptimizer(distrib_optimizer.DistributedOptimizer):
        """DistributedOptimizer whose inner optimizer is torch.optim.AdamW (no Transformer Engine, no Apex)."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with _cuda_type_names():
                super().__init__(*args, **kwargs)

        def state_dict(self) -> dict[str, Any]:
            # distrib_optimizer.py:642 asserts that all parameters share one step; before the first update the torch
            # state is empty and there is none.
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    if not self.optimizer.state[p]:
                        self.optimizer.state[p] = {
                            "step": torch.zeros((), dtype=torch.float32),
                            "exp_avg": torch.zeros_like(p.data),
                            "exp_avg_sq": torch.zeros_like(p.data),
                        }
            return super().state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            with torch.no_grad():
                super().load_state_dict(state_dict)
            # distrib_optimizer.py:825 gives every parameter the SAME step tensor, which torch's AdamW then increments
            # once per parameter: loading succeeds, the next loss is right, and the run drifts from there.
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

        def _set_main_param_and_optimizer_states(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
            # distrib_optimizer.py:940 copies in place into leaf parameters and expects a tensor for 'step' too, which
            # load_state_dict has set already.
            with torch.no_grad():
                for key, target in self._get_main_param_and_optimizer_states(model_param).items():
                    if key != "step":
                        target.copy_(tensors[key])

    mixed_init = base_optimizer.Float16OptimizerWithFloat16Params.__init__

    def init_with_cuda_names(self: Any, *args: Any, **kwargs: Any) -> None:
        with _cuda_type_names():
            mixed_init(self, *args, **kwargs)

    def clip(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
        # clip_grads.py:167 asserts the type name of every gradient; the arithmetic is the same.
        if isinstance(parameters, torch.Tensor):
            parameters = [parameters]
        grads = [p.grad.detach() for p in parameters if p.grad is not None]
        coefficient = max_norm / (total_norm + 1.0e-6)
        if grads and coefficient < 1.0:
            torch._foreach_mul_(grads, coefficient)

    mcore_optimizer.DistributedOptimizer = TorchDistributedOptimizer
    base_optimizer.Float16OptimizerWithFloat16Params.__init__ = init_with_cuda_names
    clip_grads.clip_grad_by_total_norm_fp32 = clip
    base_optimizer.clip_grad_by_total_norm_fp32 = clip


def _skip_collectives_with_oneself() -> None:
    """distributed/param_and_grad_buffer.py:275, 452: with one data-parallel rank, the reduce-scatter of the gradients
    and the all-gather of the parameters copy each buffer onto itself, three passes over the whole model per step.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def skipping(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: torch.Tensor, source: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            same = output.data_ptr() == source.data_ptr() and output.numel() == source.numel()
            if group is not None and group.size() == 1 and same:
                return None
            return collective(output, source, *args, group=group, **kwargs)

        return call

    buffers.dist_reduce_scatter_func = skipping(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = skipping(buffers.dist_all_gather_func)


def _keep_freed_memory() -> None:
    """Let the C library keep freed memory instead of returning it to the system after every large tensor.

    Tensors above 128 KiB are otherwise mapped anew each time, and the page faults of first use cost more than many of
    the kernels that fill them: 8 % of a training step at 10M parameters. Only glibc has the switch.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 64 * 2**20)


def _adapt_checkpointing() -> None:
    """dist_checkpointing/strategies/filesystem_async.py:250 forks a process for each file, and :55 starts a Manager by
    spawn, which re-imports the main script, to bring their results back. Both outlive a save that is killed and go on
    writing. Here this process writes, one file after the other, and an ordinary queue carries the results.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results: queue.Queue[Any] = queue.Queue()

    def write_here(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], global_results: Any) -> None:
        written: Any = {}
        for index, bucket in enumerate(buckets):
            outcome: queue.Queue[Any] = queue.Queue()
            running: queue.Queue[int] = queue.Queue()
            running.put(index)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, outcome, running, use_fsync=True
            )
            found = outcome.get()[1]
            if isinstance(found, Exception):
                written = found
                break
            written[index] = found
        global_results.put(written)

    filesystem_async._get_write_results_queue = lambda: results
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(write_here)


def _adapt_tensor_cuda() -> None:
    """language_module.py:244 and exchange_utils.py:336, 499 call ``tensor.cuda()``, which without CUDA only raises."""

    def stay(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self

    torch.Tensor.cuda = stay  # type: ignore[method-assign,assignment]


@contextlib.contextmanager
def allocating_on(device: torch.device) -> Iterator[None]:
    """While open, what Megatron-Core allocates on the current CUDA device lies on `device`; "meta" takes no memory."""
    global _CPU
    before, _CPU = _CPU, device
    try:
        yield
    finally:
        _CPU = before


_adapted = False


def adapt() -> None:
    """Make Megatron-Core run on the CPU in this process. Safe to call again.

    Raises:
        RuntimeError: If a CUDA device is present: there the unmodified library must be used.
    """
    global _adapted
    if torch.cuda.is_available():
        raise RuntimeError("runtime.cpu.adapt() must not be applied where a CUDA device is present")
    if _adapted:
        return
    stand_in = _CpuTorch()
    for name in ADAPTED_MODULES:
        module: Any = importlib.import_module(name)
        module.torch = stand_in
    _adapt_rng()
    _adapt_optimizers()
    _adapt_checkpointing()
    _adapt_tensor_cuda()
    _skip_collectives_with_oneself()
    _keep_freed_memory()
    _adapted = True
