"""See float8_tensor.py above."""

from ..float8_tensor import Float8Tensor

__all__ = ["Float8Tensor"]
