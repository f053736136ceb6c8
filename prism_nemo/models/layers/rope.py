"""Inverse frequencies of the rotary position embedding."""

from __future__ import annotations

import math

import torch

from prism_nemo.models.family import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Inverse frequencies, in fp32.

    Megatron-Core fixes llama3's low and high factors and original length (rotary_pos_embedding.py) and takes only
    ``factor``; a configuration with other values would be wrong without a word, so all of them are computed here.

    Args:
        rope: Base and scaling. The llama3 formula is that of Llama 3.1's reference implementation: wavelengths longer
            than ``original / low_freq_factor`` are divided by ``factor``, shorter than ``original / high_freq_factor``
            are kept, and between them the two are interpolated.
        head_dim: Size of a head.

    Returns:
        [head_dim / 2].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.scaling is None:
        return inv_freq
    factor = rope.scaling["factor"]
    if rope.scaling["rope_type"] == "linear":
        return inv_freq / factor
    low, high = rope.scaling["low_freq_factor"], rope.scaling["high_freq_factor"]
    original = rope.scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq
