"""Checkpoints in the folder layout of NeMo 2.x: read and written without NeMo, executing nothing that they contain."""
