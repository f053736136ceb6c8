"""The tensors that a checkpoint is made of, and memory that two processes share to hand them over."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from prism_nemo.errors import PrismError
from prism_nemo.precision.linear import delayed_scales

_ALIGNMENT = 64


class Trained(Protocol):
    """What is saved: `prism_nemo.training.trainer.Trainer` has it."""

    optimizer: Any

    @property
    def raw(self) -> Any:
        """This rank's unwrapped model."""


@dataclass(frozen=True)
class Entry:
    """One tensor's place."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


def _inner(optimizer: Any) -> list[Any]:
    return [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]


def state_tensors(trained: Trained) -> dict[str, torch.Tensor]:
    """This rank's weights, main weights, moments and FP8 scales by name, in an order that depends on the model alone.

    Moments exist from the first update on; here they are made where they do not, as torch would make them. Delayed
    scales are no parameters nor buffers: Megatron saves them as the layers' extra state, which it asks the model for.
    """
    found = {f"model.{name}": tensor.detach() for name, tensor in trained.raw.named_parameters()}
    found.update({f"model.{name}": tensor for name, tensor in trained.raw.named_buffers()})
    model_memory = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    for i, inner in enumerate(_inner(trained.optimizer)):
        for j, parameter in enumerate(p for group in inner.param_groups for p in group["params"]):
            # With fp32 the "main" parameters are views of the model's.
            if parameter.untyped_storage().data_ptr() not in model_memory:
                found[f"optimizer.{i}.{j}.main"] = parameter.detach()
            state = inner.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(parameter.detach())
            for key in sorted(state):
                found[f"optimizer.{i}.{j}.{key}"] = state[key]
    for name, scale in delayed_scales(trained.raw).items():
        found[f"fp8.{name}.history"], found[f"fp8.{name}.scale"] = scale.history, scale.scale
    return found


def group_values(optimizer: Any) -> list[list[dict[str, Any]]]:
    """Learning rate, weight decay and the other values of the optimizer's groups."""
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
        for inner in _inner(optimizer)
    ]


def set_group_values(optimizer: Any, values: list[list[dict[str, Any]]]) -> None:
    """Put back what `group_values` gave."""
    for inner, groups in zip(_inner(optimizer), values, strict=True):
        for group, new in zip(inner.param_groups, groups, strict=True):
            group.update(new)


def lay_out(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    """A place for each tensor, one behind the other."""
    entries, offset = [], 0
    for name, tensor in tensors.items():
        entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, offset))
        offset += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return entries


class Staging:
    """Memory for one snapshot, shared with the process that writes it.

    Args:
        layout: From `lay_out`.
        descriptor: Of memory that the other process made, or None to make it.

    Attributes:
        size: In bytes.
    """

    def __init__(self, layout: list[Entry], descriptor: int | None = None) -> None:
        self.layout = layout
        last = layout[-1]
        self.size = last.offset + max(1, torch.Size(last.shape).numel()) * last.dtype.itemsize
        if descriptor is None:
            # Not a file in /dev/shm, which is 64 MB in many containers.
            descriptor = os.memfd_create("prism-nemo-checkpoint")
            os.ftruncate(descriptor, self.size)
        self.descriptor = descriptor
        # Populated now: the first copy would otherwise pay a page fault for every 4 KiB, in the training loop.
        self._memory = mmap.mmap(descriptor, self.size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._views = [self._view(entry) for entry in layout]

    def _view(self, entry: Entry) -> torch.Tensor:
        count = torch.Size(entry.shape).numel()
        if not count:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(self._memory, dtype=entry.dtype, count=count, offset=entry.offset).view(entry.shape)

    @torch.no_grad()
    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the tensors in.

        Raises:
            PrismError: If they are not those of the layout.
        """
        torch._foreach_copy_(self._views, self._checked(tensors))

    @torch.no_grad()
    def empty_into(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy them out, in place.

        Raises:
            PrismError: If they are not those of the layout.
        """
        torch._foreach_copy_(self._checked(tensors), self._views)

    def _checked(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        values = list(tensors.values())
        if list(tensors) != [e.name for e in self.layout] or any(
            tuple(v.shape) != e.shape or v.dtype != e.dtype for v, e in zip(values, self.layout, strict=True)
        ):
            expected = {(e.name, e.shape, e.dtype) for e in self.layout}
            odd = sorted(expected ^ {(n, tuple(t.shape), t.dtype) for n, t in tensors.items()}, key=str)
            raise PrismError(
                f"the process that writes checkpoints and the trainer hold different tensors ({odd[:2]}); set "
                "checkpoint.async_save=false"
            )
        return values
