"""Tiny random Llama models as Hugging Face folders, and small edits of such folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

# Weights of standard deviation 0.2 give logits of about 1: with the usual 0.02 they would be so small that a wrong
# mapping hides behind an absolute tolerance. A base of 100 turns the slowest head once in some 350 positions, so that a
# wrong frequency shows within the 64 tokens that `verify` compares.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LLAMA3 = {  # not the factors (1, 4, 8192) that Megatron-Core has built in
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}


def save_tiny_llama(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A random model with every parameter away from its initial 0 or 1, so that no mapping can be skipped unseen."""
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**DEFAULTS, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
    model.to(dtype).save_pretrained(folder)
    return folder


def edited_copy(
    source: Path,
    folder: Path,
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
    config: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """A copy of a single-file Hugging Face folder with its tensors or its config.json edited in place."""
    shutil.copytree(source, folder)
    if tensors is not None:
        values = load_file(folder / "model.safetensors")
        tensors(values)
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        settings = json.loads((folder / "config.json").read_text())
        config(settings)
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder, whichever file holds it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors
