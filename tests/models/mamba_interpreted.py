"""Run as a script: the published Triton kernels of mamba_ssm on CPU tensors, in Triton's interpreter, against ours.

Everything that must be pretended for that stays in this process. Prints one JSON object of differences, each relative
to the largest entry.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton  # noqa: F401  before anything of mamba_ssm, and after the variable

from prism_nemo.models.layers import mamba_kernels


class _NoDevice:
    """Stands for ``torch.cuda.device``."""

    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


def pretend() -> None:
    """Let the kernels' wrappers run without CUDA, and import them without the package, which needs its extension."""
    from triton.runtime.autotuner import Autotuner

    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for name in ("mamba_ssm", "mamba_ssm.utils", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    cuda: Any = torch.cuda
    cuda.device = _NoDevice
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=1)
    cuda.amp.custom_fwd = cuda.amp.custom_bwd = lambda f=None, **_: f or (lambda g: g)

    def first_configuration(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Instead of measuring all. Its hook zeroes the outputs that the kernel adds to."""
        best = self.best_config = self.configs[0]
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        if best.pre_hook:
            best.pre_hook({**self.nargs, **kwargs, **best.all_kwargs()})
        return self.fn.run(*args, **{**kwargs, **best.all_kwargs()})

    Autotuner.run = first_configuration


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(
    seq_idx: torch.Tensor | None, dt_limit: tuple[float, float] = (0.0, float("inf")), ours: torch.Tensor | None = None
) -> dict[str, float]:
    """Output and every gradient of `mamba_kernels.scan`, by the published kernels and by ours, in fp32.

    Args:
        seq_idx: For the published kernels.
        dt_limit: For both.
        ours: Another `seq_idx` for ours, to see that the comparison would notice.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    b, length, h, p, g, n = 2, 43, 4, 16, 2, 16
    values = {
        "x": normal(b, length, h, p),
        "dt": normal(b, length, h),
        "A": -torch.rand(h, generator=generator) * 4 - 1,
        "B": normal(b, length, g, n) / 2,
        "C": normal(b, length, g, n) / 2,
        "D": torch.rand(h, generator=generator),
        "dt_bias": normal(h) - 2,
    }
    weight = normal(b, length, h, p)
    results = []
    for cuda, index in ((True, seq_idx), (False, seq_idx if ours is None else ours)):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        torch.Tensor.is_cuda = property(lambda self, answer=cuda: answer)  # type: ignore[assignment]
        y = mamba_kernels.scan(**leaves, dt_limit=dt_limit, chunk_size=16, seq_idx=index)
        gradients = torch.autograd.grad((y * weight).sum(), list(leaves.values()))
        del torch.Tensor.is_cuda
        results.append({"y": y, **{f"d{name}": t for name, t in zip(leaves, gradients, strict=True)}})
        assert ("MambaChunkScan" in type(y.grad_fn).__name__) == cuda, f"wrong kernels: {y.grad_fn}"
    return {name: difference(theirs, results[1][name]) for name, theirs in results[0].items()}


def main() -> None:
    pretend()
    documents = torch.zeros(2, 43, dtype=torch.int32)
    documents[0, 5:], documents[0, 20:], documents[1, 16:] = 1, 2, 1
    results = {
        "one document": compare(None),
        "several documents": compare(documents),
        "limited dt": compare(documents, (0.05, 0.5)),
        "control": compare(documents, ours=torch.zeros_like(documents)),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
