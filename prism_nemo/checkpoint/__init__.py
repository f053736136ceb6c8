"""Checkpoints: native (distributed, reshardable) and Hugging Face (safetensors, both ways)."""
