"""What answers questions and scores texts: our own Megatron model, transformers, or vLLM."""
