"""Model families: Hugging Face configuration and weights to Megatron-Core and back, from one table per family."""
