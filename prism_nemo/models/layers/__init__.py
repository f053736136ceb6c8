"""What Megatron-Core lacks without Transformer Engine: attention, norm and cross entropy on plain torch kernels."""
