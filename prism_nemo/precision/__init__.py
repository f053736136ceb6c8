"""The numbers that training computes in: bf16 with fp32 master weights, FP8, and FP8 emulated without a GPU."""
