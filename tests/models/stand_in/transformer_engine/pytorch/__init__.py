"""See the package."""

from . import attention, distributed, fp8, layers, module, ops, router, tensor
from .attention import DotProductAttention
from .fp8 import fp8_autocast, fp8_model_init
from .layers import GroupedLinear, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "attention",
    "distributed",
    "fp8",
    "fp8_autocast",
    "fp8_model_init",
    "layers",
    "module",
    "ops",
    "router",
    "tensor",
]
