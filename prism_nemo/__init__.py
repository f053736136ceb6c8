"""prism-nemo: retention-aware mid-training and verifiable-reward RL on Megatron-Core."""

__version__ = "0.1.0"
