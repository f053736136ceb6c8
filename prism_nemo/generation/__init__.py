"""Sampling from the Megatron model itself, with a key/value cache and the trainer's own weights."""
