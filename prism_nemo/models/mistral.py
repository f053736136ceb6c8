"""The Mistral family: Llama's layers with a sliding attention window, or without one (Mistral Small)."""

from __future__ import annotations

from typing import Any

from prism_nemo.models.family import Architecture, Family, register
from prism_nemo.models.hf_config import HFConfig
from prism_nemo.models.llama import dense_table, read_decoder
from prism_nemo.models.weights import WeightMapping


class Mistral(Family):
    """MistralForCausalLM.

    Hugging Face counts the token itself in ``sliding_window``: a window of W sees W - 1 tokens to the left.
    """

    name = "mistral"
    architectures = ("MistralForCausalLM",)

    def from_hf(self, config: dict[str, Any], source: str) -> Architecture:
        """See `Family.from_hf`."""
        read = HFConfig(config, source, self.name)
        read.require("attention_dropout", 0.0)
        # Alternating windows are another model (Ministral), even though the class would load it.
        read.require("layer_types")
        # In a file without the key the class has a window of 4096; null is none.
        window = read.size("sliding_window", None) if "sliding_window" in config else 4096
        # The class's own defaults, which are not Llama's.
        read.values = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, **config}
        fields = read_decoder(read)
        rope = read.rope()
        read.finish()
        return Architecture(**{**fields, "hf_config": dict(config)}, rope=rope, sliding_window=window)

    def weight_table(self, architecture: Architecture, tensor_model_parallel_size: int) -> list[WeightMapping]:
        """See `Family.weight_table`."""
        return dense_table(architecture, tensor_model_parallel_size)


register(Mistral())
