"""Quantised weights, of which there are none."""

from .tensor import QuantizedTensor


class Float8Tensor(QuantizedTensor):
    """Megatron asks whether a weight is one."""
