"""The benchmarks that run through lm-eval: which, asked how, read from where, and turned into our results."""
